"""Sets of ranks as spans, and how to name them in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_NAMED = 3
"""Spans named before the rest is only counted."""


@dataclass(frozen=True)
class Ranks:
    """Rank numbers, ascending, as spans (first, last): ten thousand equal ranks are one span."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ranks: Iterable[int]) -> Ranks:
        spans: list[tuple[int, int]] = []
        for r in sorted(set(ranks)):
            if spans and spans[-1][1] == r - 1:
                spans[-1] = spans[-1][0], r
            else:
                spans.append((r, r))
        return cls(tuple(spans))

    def __iter__(self) -> Iterator[int]:
        return (r for first, last in self.spans for r in range(first, last + 1))

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.spans)

    def __contains__(self, rank: object) -> bool:
        return isinstance(rank, int) and any(first <= rank <= last for first, last in self.spans)

    def __str__(self) -> str:
        """``rank 3``, ``ranks 0 to 7``, ``ranks 3, 17, 20 to 29 and 40 more``."""
        shown, left = self.spans[:_NAMED], self.spans[_NAMED:]
        words = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in shown]
        rest = len(Ranks(left))
        if rest:
            words.append(f"{rest} more")
        text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
        return f"{'rank' if len(self) == 1 else 'ranks'} {text}"
