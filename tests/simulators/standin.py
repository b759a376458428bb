"""Builds importable modules from a contract and answers, and installs them under their real import paths."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from simulators.contract import Contract, Function
from simulators.fake_device import unrecorded

Answer = Callable[[SimpleNamespace], Any]
"""Takes every parameter of the contract by name, with defaults filled in; returns what the real function returns."""


class StandIn:
    """One vendor package. ``calls`` holds (name, parameters) of everything that was called, in order."""

    def __init__(
        self, contract: str | Contract, answers: Mapping[str, Any], values: Mapping[str, Any] | None = None
    ) -> None:
        """``answers``: dotted name of the contract -> function of one namespace, or for a class a class whose methods
        take one; a function without an answer can be imported and raises when called. ``values``: dotted names of
        module attributes that are no functions."""
        self.contract = Contract.load(contract) if isinstance(contract, str) else contract
        self.answers = answers
        self.values = values or {}
        self.calls: list[tuple[str, SimpleNamespace]] = []
        owners = {n.rpartition(".")[0] for n, f in self.contract.functions.items() if f.kind == "method"}
        if unknown := set(answers) - set(self.contract.functions) - owners:
            raise ValueError(f"{self.contract.name}: answers to functions that the contract lacks: {sorted(unknown)}")

    def last(self, name: str) -> SimpleNamespace:
        """Parameters of the last call of the function whose dotted name ends with ``name``."""
        return next(a for n, a in reversed(self.calls) if f".{n}".endswith(f".{name}"))

    def names(self, name: str) -> list[SimpleNamespace]:
        """Parameters of all calls of that function."""
        return [a for n, a in self.calls if f".{n}".endswith(f".{name}")]

    def members(self) -> Iterator[tuple[str, Any]]:
        """(dotted path, object) of everything a user may import."""
        functions = self.contract.functions
        members = {n.rpartition(".")[0] for n, f in functions.items() if f.kind in ("method", "static")}
        for name in sorted(members | {n for n, f in functions.items() if f.kind == "class"}):
            yield name, self._class(name)
        for name, function in functions.items():
            if function.kind in ("function", "torch_op"):
                yield name, self._function(function)
        yield from self.values.items()

    def _function(self, function: Function) -> Callable[..., Any]:
        answer = self.answers.get(function.name)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = SimpleNamespace(**function.bind(args, kwargs))
            self.calls.append((function.name, given))
            if answer is None:
                raise NotImplementedError(f"{function.name}: this stand-in has no answer")
            with unrecorded():
                return answer(given)

        return _named(call, function)

    def _class(self, name: str) -> type:
        """The answer's class with the contract's signatures on its methods."""
        functions = self.contract.functions
        base = self.answers.get(name, object)
        body: dict[str, Any] = {}
        for dotted, function in functions.items():
            if dotted != name and dotted.rpartition(".")[0] != name:
                continue
            method = "__init__" if dotted == name else dotted.rpartition(".")[2]
            own = self.answers.get(dotted) if function.kind == "static" else None
            body[method] = self._method(function, own or getattr(base, method, None))
        return type(name.rpartition(".")[2], (base,), {**body, "__module__": name.rpartition(".")[0]})

    def _method(self, function: Function, answer: Callable[..., Any] | None) -> Any:
        calls = self.calls

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = SimpleNamespace(**function.bind(args, kwargs))
            calls.append((function.name, given))
            if answer is None:
                raise NotImplementedError(f"{function.name}: this stand-in has no answer")
            with unrecorded():
                return answer(self, given)

        def call_static(*args: Any, **kwargs: Any) -> Any:
            if answer is None:
                raise NotImplementedError(f"{function.name}: this stand-in has no answer")
            return answer(SimpleNamespace(**function.bind(args, kwargs)))

        return staticmethod(_named(call_static, function)) if function.kind == "static" else _named(call, function)


def _named(call: Callable[..., Any], function: Function) -> Callable[..., Any]:
    call.__name__ = function.name.rpartition(".")[2]
    call.__signature__ = function.signature  # type: ignore[attr-defined]
    return call


class Empty(StandIn):
    """For measuring: every function has an empty body and checks nothing; ``answers`` are the bodies."""

    def _function(self, function: Function) -> Callable[..., Any]:
        body: Callable[..., Any] = self.answers.get(function.name, _nothing)
        return body

    def _class(self, name: str) -> type:
        own = [n.rpartition(".")[2] for n in self.contract.functions if n.rpartition(".")[0] == name]
        return type(name, (self.answers.get(name, object),), {"__init__": _nothing, **dict.fromkeys(own, _nothing)})


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def installed(*stand_ins: StandIn) -> Iterator[None]:
    """The stand-ins importable under their real paths, and nothing of them left afterwards.

    Dotted names below ``torch`` (``torch.ops.npu.x``) become attributes of the real torch. Only imports made inside
    see them: bind adapters here; what they hold keeps working outside.
    """
    modules: dict[str, ModuleType] = {}
    patched: list[tuple[Any, str]] = []
    for stand_in in stand_ins:
        found = dict(stand_in.members())
        found.update({alias: found[name] for alias, name in stand_in.contract.aliases.items() if name in found})
        for dotted, value in found.items():
            path, _, leaf = dotted.rpartition(".")
            if dotted.startswith("torch."):
                owner = torch
                for part in path.split(".")[1:]:
                    owner = getattr(owner, part)
                patched.append((owner, leaf))
                setattr(owner, leaf, value)
            else:
                setattr(_module(path, modules), leaf, value)
    saved = {
        name: sys.modules[name]
        for name in list(sys.modules)
        if name.split(".")[0] in {m.split(".")[0] for m in modules}
    }
    for name in saved:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(saved)
        for owner, leaf in patched:
            delattr(owner, leaf)
        importlib.invalidate_caches()


def _module(path: str, modules: dict[str, ModuleType]) -> ModuleType:
    if path not in modules:
        module = modules[path] = ModuleType(path)
        module.__path__ = []
        module.__spec__ = ModuleSpec(path, None, is_package=True)
        parent, _, leaf = path.rpartition(".")
        if parent:
            setattr(_module(parent, modules), leaf, module)
    return modules[path]
