"""Sets of allowed values: what a backend accepts, what a constraint leaves, what a user pins.

One class, closed under intersection. ``OneOf``, ``NoneOf``, ``MultipleOf`` and ``ANY`` are its spellings::

    >>> OneOf(64, 32, 16) & MultipleOf(32)
    OneOf(64, 32)
    >>> MultipleOf(16) & MultipleOf(24) & NoneOf(96)
    MultipleOf(48) & NoneOf(96)
    >>> 48 in MultipleOf(16, max=64), 80 in MultipleOf(16, max=64)
    (True, False)

The order of ``OneOf`` is a preference; an intersection keeps the order of its left operand.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from attn_core.errors import DeclarationError

Value = Hashable


def _same(value: Value, members: tuple[Value, ...]) -> bool:
    """Membership that tells ``True`` from ``1``, which ``in`` does not."""
    return any(value == m and isinstance(value, bool) is isinstance(m, bool) for m in members)


@dataclass(frozen=True, slots=True)
class Domain:
    """A set of values: listed ones, or all values less ``excluded``, optionally multiples within bounds."""

    values: tuple[Value, ...] | None = None
    excluded: tuple[Value, ...] = ()
    step: int | None = None
    min: int | None = None
    max: int | None = None

    def __contains__(self, value: Value) -> bool:
        if self.values is not None:
            return _same(value, self.values)
        if self.excluded and _same(value, self.excluded):
            return False
        if self.step is None:
            return True
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value % self.step == 0
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
        )

    def __and__(self, other: Domain) -> Domain:
        if self.values is not None:
            return Domain(values=tuple(v for v in self.values if v in other))
        if other.values is not None:
            return Domain(values=tuple(v for v in other.values if v in self))
        steps = [d.step for d in (self, other) if d.step is not None]
        mins = [d.min for d in (self, other) if d.min is not None]
        maxs = [d.max for d in (self, other) if d.max is not None]
        return Domain(
            excluded=self.excluded + tuple(v for v in other.excluded if not _same(v, self.excluded)),
            step=math.lcm(*steps) if steps else None,
            min=max(mins) if mins else None,
            max=min(maxs) if maxs else None,
        )

    @property
    def is_any(self) -> bool:
        return self.values is None and not self.excluded and self.step is None

    @property
    def named(self) -> tuple[Value, ...]:
        """The values this domain mentions: candidates for a finite universe."""
        if self.values is not None:
            return self.values
        bounds = (self.step, self.min, self.max)
        return tuple(v for v in bounds if v is not None and v in self) + self.excluded

    def filter(self, values: Iterable[Value]) -> tuple[Value, ...]:
        """``values`` restricted to this domain, in this domain's order of preference where it has one."""
        pool = tuple(values)
        if self.values is not None:
            return tuple(v for v in self.values if _same(v, pool))
        return tuple(v for v in pool if v in self)

    def to_json(self) -> object:
        """A list of values, or an object naming what is excluded, the step and the bounds."""
        if self.values is not None:
            return list(self.values)
        parts = {"not": list(self.excluded), "multiple_of": self.step, "min": self.min, "max": self.max}
        return {k: v for k, v in parts.items() if v not in (None, [])} or "any"

    def __str__(self) -> str:
        """As a person reads it: ``16, 32 or 64``; ``multiples of 16 up to 256``."""
        if self.values is not None:
            shown = [str(v) for v in self.values]
            return "nothing" if not shown else " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
        parts = []
        if self.step is not None:
            parts.append("any size" if self.step == 1 else f"multiples of {self.step}")
            if self.min is not None:
                parts.append(f"from {self.min}")
            if self.max is not None:
                parts.append(f"up to {self.max}")
        if self.excluded:
            parts.append(("except " if parts else "anything but ") + ", ".join(map(str, self.excluded)))
        return " ".join(parts) or "anything"

    def __repr__(self) -> str:
        if self.values is not None:
            return f"OneOf({', '.join(map(repr, self.values))})"
        parts = []
        if self.step is not None:
            bounds = "".join(f", {k}={v}" for k, v in (("min", self.min), ("max", self.max)) if v is not None)
            parts.append(f"MultipleOf({self.step}{bounds})")
        if self.excluded:
            parts.append(f"NoneOf({', '.join(map(repr, self.excluded))})")
        return " & ".join(parts) or "ANY"


ANY = Domain()
"""Every value."""


def OneOf(*values: Value) -> Domain:  # noqa: N802 - reads as a type where declarations use it
    """Exactly these values, most preferred first. Duplicates keep their first place."""
    unique: list[Value] = []
    for v in values:
        if not _same(v, tuple(unique)):
            unique.append(v)
    return Domain(values=tuple(unique))


def NoneOf(*values: Value) -> Domain:  # noqa: N802
    """Everything but these values."""
    return Domain(excluded=OneOf(*values).values or ())


def MultipleOf(n: int, min: int | None = None, max: int | None = None) -> Domain:  # noqa: N802
    """Integers divisible by ``n`` within the inclusive bounds; ``min`` defaults to ``n`` (sizes are positive)."""
    if n < 1:
        raise DeclarationError(f"MultipleOf needs a positive step, got {n}; write OneOf(...) for listed values")
    return Domain(step=n, min=n if min is None else min, max=max)


def domain(value: object) -> Domain:
    """Read a declaration's shorthand: a Domain, ``True`` (claimed: any value), a list of values, or one value."""
    if isinstance(value, Domain):
        return value
    if value is True:
        return ANY
    if isinstance(value, list | set | frozenset):
        return OneOf(*(sorted(value) if isinstance(value, set | frozenset) else value))
    if isinstance(value, Hashable):
        return OneOf(value)
    raise DeclarationError(
        f"cannot read {value!r} as a domain; use OneOf, NoneOf, MultipleOf, ANY, a list or one value"
    )
