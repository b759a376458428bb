"""Facts about a vendor's package, read from ``contracts/*.json``: names, signatures, limits and quirks."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent / "contracts"
PARTS = ("functions", "aliases", "limits", "quirks")


class Refused(RuntimeError):  # noqa: N818 (the word the vendors' own checks stand for)
    """The real function raises for these arguments."""


class Misuse(RuntimeError):  # noqa: N818
    """The real function takes these arguments and answers wrongly, or hangs: what an adapter must never pass."""


class Source:
    """A default known only as source text (a constant of the vendor's module)."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Function:
    """One callable of the contract."""

    name: str
    """Dotted import path; methods and constructors below their class."""
    kind: str
    """``function``, ``class``, ``method``, ``static`` or ``torch_op``."""
    signature: inspect.Signature

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All parameters by name, defaults filled in. Raises what the real one raises: TypeError, ops RuntimeError."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as e:
            text = f"{self.name}(): {e}"
            raise RuntimeError(text) if self.kind == "torch_op" else TypeError(text) from None
        bound.apply_defaults()
        return bound.arguments


@dataclass(frozen=True)
class Contract:
    """One file of ``contracts``."""

    name: str
    facts: Mapping[str, Any]

    @staticmethod
    def load(name: str, *more: str) -> Contract:
        """The file of that name; with ``more`` files of the same package, all they say together."""
        files = [json.loads((HERE / f"{n}.json").read_text(encoding="utf-8")) for n in (name, *more)]
        parts = {k: {n: x for f in files for n, x in f.get(k, {}).items()} for k in PARTS} if more else {}
        return Contract(name, {**files[0], **parts})

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {
            name: Function(name, entry["kind"], signature(entry["signature"]))
            for name, entry in self.facts["functions"].items()
        }

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other import paths: alias -> name in ``functions``."""
        aliases: Mapping[str, str] = self.facts.get("aliases", {})
        return aliases

    @property
    def quirks(self) -> Mapping[str, str]:
        """What the real package does that nobody expects: name -> sentence. Each has a test of its stand-in."""
        quirks: Mapping[str, str] = self.facts.get("quirks", {})
        return quirks

    def limit(self, what: str) -> Any:
        """A fact by name, as it stands in ``limits``."""
        return self.facts["limits"][what]["is"]

    def require(self, what: str, value: object, where: str = "") -> None:
        """Raise :class:`Refused` unless ``value`` is within the limit ``what``.

        Limits: ``{"is": [..]}`` one of these; ``{"is": {"multiple_of": n, "min": a, "max": b}}``; each may be left out.
        """
        limit = self.limit(what)
        if isinstance(limit, list):
            ok = (list(value) if isinstance(value, tuple) else value) in limit
        else:
            assert isinstance(value, int)
            ok = value % limit.get("multiple_of", 1) == 0 and value >= limit.get("min", value)
            ok = ok and value <= limit.get("max", value)
        if not ok:
            raise Refused(f"{where or self.name}: {what}={value!r} is not accepted; accepted: {limit}")

    def require_dtype(self, what: str, *tensors: torch.Tensor) -> None:
        for t in tensors:
            self.require(what, str(t.dtype).removeprefix("torch."))


def signature(text: str) -> inspect.Signature:
    """``"(a, b=None, *, c=torch.bfloat16)"`` as a Signature; defaults are evaluated where they are plain values."""
    (function,) = ast.parse(f"def f{text}: pass").body
    assert isinstance(function, ast.FunctionDef)
    a, kinds = function.args, inspect.Parameter
    positional = [
        *((p, kinds.POSITIONAL_ONLY) for p in a.posonlyargs),
        *((p, kinds.POSITIONAL_OR_KEYWORD) for p in a.args),
    ]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(a.defaults)), *a.defaults]
    found = [kinds(p.arg, kind, default=_value(d)) for (p, kind), d in zip(positional, defaults)]
    if a.vararg:
        found.append(kinds(a.vararg.arg, kinds.VAR_POSITIONAL))
    found += [kinds(p.arg, kinds.KEYWORD_ONLY, default=_value(d)) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        found.append(kinds(a.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(default)
    except ValueError:
        text = ast.unparse(default)
        return getattr(torch, text[6:], Source(text)) if text.startswith("torch.") else Source(text)
