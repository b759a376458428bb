"""Running a plugin's code so that its failure stays its own.

Loading, registering, calling and validating are guarded one by one. ``Exception`` and ``SystemExit`` are contained
and become text; ``KeyboardInterrupt`` and every other ``BaseException`` belong to the user or the host and pass.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pluggy

from attn_core import hookspecs
from attn_core.plugins.validate import check_item
from attn_core.spec.check import nearest

_log = logging.getLogger("attn_core")
T = TypeVar("T")

_PREFIX = "attn_"
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith(_PREFIX))
_MOST_ITEMS = 10_000
"""A generator that yields more than this is broken, and would otherwise never end."""


class ContainedError(Exception):
    """What went wrong in a plugin, in one line naming the stage, with what to do about it in ``hint``."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


@contextmanager
def guard(where: str) -> Iterator[None]:
    """Turn what a plugin raises into :class:`ContainedError`, named after the stage or hook ``where``."""
    try:
        yield
    except ContainedError:
        raise
    except (Exception, SystemExit) as e:
        _log.debug("contained in %s", where, exc_info=True)
        raise ContainedError(f"{where}: {_describe(e)}") from e


def _describe(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except (Exception, SystemExit):
        text = "its message cannot be printed"
    text = text if len(text) <= 400 else f"{text[:400]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load(reference: str) -> Any:
    """Import ``module`` or ``module:object``; raises :class:`ContainedError`."""
    with guard("import"):
        module, _, path = reference.partition("[")[0].partition(":")
        plugin: Any = importlib.import_module(module.strip())
        for attribute in path.strip().split(".") if path.strip() else ():
            plugin = getattr(plugin, attribute)
        return plugin


class _Manager(pluggy.PluginManager):
    """Looks at names with our prefix only: reading every attribute of a lazy module would import what it hides."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name.startswith(_PREFIX) else None


class Hooks:
    """The hooks of one plugin, in a manager of their own.

    Nothing one plugin registers can reach another, plugins are never compared with each other, and a registration
    that fails half-way is rolled back by dropping its manager. Raises :class:`ContainedError` for hooks that could
    never be called as their author meant.
    """

    def __init__(self, plugin: Any) -> None:
        self._manager = _Manager("attn_core")
        self._manager.add_hookspecs(hookspecs)
        with guard("register"):
            self._manager.register(plugin)
            self.names = frozenset(self._check(plugin))

    def _check(self, plugin: Any) -> Iterator[str]:
        for caller in self._manager.get_hookcallers(plugin) or ():
            name = caller.name
            for impl in caller.get_hookimpls():
                if caller.spec is None:
                    if not impl.optionalhook:
                        raise ContainedError(f"register: unknown hook {name!r}{nearest(name, HOOKS)}", _KNOWN)
                    continue
                if impl.wrapper or impl.hookwrapper:
                    raise ContainedError(f"register: {name} is declared as a wrapper", "hooks only return facts")
                if defaulted := set(impl.kwargnames) & set(caller.spec.argnames):
                    raise ContainedError(
                        f"register: {name} gives its argument {min(defaulted)!r} a default",
                        "pluggy passes only arguments without one; remove the default",
                    )
                yield name
        registered = {c.name for c in self._manager.get_hookcallers(plugin) or ()}
        for name in HOOKS:
            if name not in registered and inspect.isroutine(inspect.getattr_static(plugin, name, None)):
                raise ContainedError(f"register: {name} is not marked as a hook", "decorate it with @hookimpl")

    def collect(self, hook: str, kind: type[T], check: Callable[[T], None] | None = None, **arguments: Any) -> list[T]:
        """Call one hook, consume what it gives and validate every item: all of it, or :class:`ContainedError`.

        ``check`` adds what only the caller knows about an item; it raises to refuse it.
        """
        if hook not in self.names:
            return []
        with guard(hook):
            answers = getattr(self._manager.hook, hook)(**arguments)
        out: list[T] = []
        with guard(hook):
            items = iter(answers[0] if answers else ())
        while True:
            with guard(f"{hook} item {len(out)}"):
                item = next(items, _END)
                if item is _END:
                    return out
                check_item(item, kind)
                if check is not None:
                    check(item)
                out.append(item)
            if len(out) > _MOST_ITEMS:
                raise ContainedError(f"{hook}: more than {_MOST_ITEMS} items", "a hook must end")


_END: Any = object()
_KNOWN = f"hooks are {', '.join(HOOKS)}; mark one for a newer contract with @hookimpl(optionalhook=True)"
