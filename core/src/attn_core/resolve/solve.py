"""Step 3: for every assignment of the shared values each space's best combination, then the best total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from attn_core.resolve.combine import Key, Universe, merge


class Fit(Protocol):
    """What is chosen in a space: one combination, or one of every kind of rank."""

    @property
    def key(self) -> Key: ...
    @property
    def shared(self) -> int:
        """Shared assignments that allow it."""


F = TypeVar("F", bound=Fit, covariant=True)


class Space(Protocol[F]):
    """Choices that meet other spaces in the shared values only."""

    @property
    def name(self) -> str: ...
    @property
    def reach(self) -> int:
        """Shared assignments outside which nothing fits."""

    @property
    def size(self) -> int:
        """About how many choices there are."""

    def frontier(self, within: int, only: Any = None, *, first: bool = False) -> Sequence[tuple[int, F]]:
        """For every shared assignment ``within``, the best fit that allows it: disjoint masks, best first."""


def best_total(
    shared: Universe, spaces: Sequence[Space[F]], only: Mapping[str, Any]
) -> tuple[Key, list[F], int] | None:
    """Best total key, one fit per space, and the shared assignments all of them allow.

    Frontiers from the smallest space to the largest; where all others offer one choice, a first fit will do. ``only``
    restricts spaces by name.
    """
    possible = shared.full
    for space in spaces:
        possible &= space.reach
    found: dict[str, Sequence[tuple[int, F]]] = {}
    for space in sorted(spaces, key=lambda s: s.size):
        first = len(found) == len(spaces) - 1 and all(len(f) == 1 for f in found.values())
        found[space.name] = frontier = space.frontier(possible, only.get(space.name), first=first)
        possible &= sum(new for new, _ in frontier)
        if not possible:
            return None
    frontiers = [found[space.name] for space in spaces]
    best: tuple[Key, list[F], int] | None = None
    for part in split(possible, frontiers):
        chosen = [next(c for new, c in frontier if new & part) for frontier in frontiers]
        key = merge([c.key for c in chosen])
        if best is None or key < best[0]:
            mask = shared.full
            for c in chosen:
                mask &= c.shared
            best = key, chosen, mask
    return best


def split(possible: int, frontiers: Sequence[Sequence[tuple[int, Any]]]) -> list[int]:
    """Partition assignments so that every space's best fit is the same throughout a part."""
    parts = [possible]
    for frontier in frontiers:
        parts = [p & new for p in parts for new, _ in frontier if p & new]
    return parts
