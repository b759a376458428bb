"""Is an item what its hook promises, all the way down? The vocabulary checks meaning, this checks the material.

The resolver sorts, compares, hashes and prints declarations without looking twice. So a declaration holds plain data
of the exact types, in every corner, or costs its plugin here and nobody later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from attn_core.domain import Domain
from attn_core.errors import DeclarationError
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec, Requirement, Tier

_NOUNS = (BackendSpec, Constraint, Device, Domain, PlatformSpec, Requirement)
_TEXTS = ("evidence", "because", "name", "install", "plugin")


def check_item(item: object, kind: type) -> None:
    """Raise :class:`DeclarationError` unless ``item`` is exactly a ``kind`` made of plain data."""
    if type(item) is not kind:
        raise DeclarationError(f"got {type(item).__name__}, wanted {kind.__name__}")
    _plain(kind.__name__, item)


def _plain(where: str, value: Any) -> None:
    if value is None or type(value) in (str, bool, int, Tier):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise DeclarationError(f"{where} is {value}, which is no quantity")
    elif type(value) in _NOUNS:
        _noun(where, value)
    elif isinstance(value, Mapping):
        _words(f"{where} keys", value)
        for key, v in value.items():
            _plain(f"{where}[{key!r}]", v)
    elif type(value) in (tuple, frozenset):
        for v in value:
            _plain(where, v)
    else:
        raise DeclarationError(f"{where} holds a {type(value).__name__}; declarations are plain data")


def _noun(where: str, value: Any) -> None:
    if is_dataclass(value):
        for f in fields(value):
            if f.init:
                _plain(f"{where}.{f.name}", getattr(value, f.name))
    for name in _TEXTS:
        text = getattr(value, name, None)
        if text is not None and type(text) is not str:
            raise DeclarationError(f"{where}.{name}={text!r} must be text")
    if isinstance(value, Domain):
        _domain(where, value)
    elif isinstance(value, BackendSpec):
        _words(f"{where}.needs", value.needs)
        for pair in value.accepts["head_dims"].named if "head_dims" in value.accepts else ():
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair)):
                raise DeclarationError(f"{where}: head_dims accepts {pair!r}, but its values are pairs of integers")
    elif isinstance(value, Device):
        _words(f"{where}.isa", value.isa)
        _words(f"{where}.versions", value.versions.values())
    elif isinstance(value, Requirement):
        _words(f"{where}.symbols", value.symbols)
        try:
            Version(value.written_for or "0")
        except (InvalidVersion, TypeError):
            raise DeclarationError(f"{where}: written_for={value.written_for!r} is not a version") from None


def _domain(where: str, d: Domain) -> None:
    if d.step is not None and (type(d.step) is not int or d.step < 1):
        raise DeclarationError(f"{where}: step {d.step!r} must be a positive integer")
    for bound in (d.min, d.max):
        if bound is not None and type(bound) is not int:
            raise DeclarationError(f"{where}: bound {bound!r} must be an integer")


def _words(where: str, values: Iterable[object]) -> None:
    for v in values:
        if type(v) is not str:
            raise DeclarationError(f"{where} holds {v!r}, which is not text")
