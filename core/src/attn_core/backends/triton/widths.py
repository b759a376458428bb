"""Widths as the kernel takes them: a power of two and a rest."""

from __future__ import annotations

from typing import NamedTuple

LEAST = 16
"""Smallest side of a matrix product in Triton."""


class Parts(NamedTuple):
    """Columns ``0:main`` and ``main:main + rest`` of tensors ``width`` wide; what lies beyond the width is masked."""

    width: int
    main: int
    rest: int
    """0 where one power of two does."""

    @property
    def columns(self) -> int:
        """Columns computed with, masked ones included."""
        return self.main + self.rest

    def halved(self) -> Parts:
        """The same with ``main`` in two: v keeps the second half as its rest, k (which has a rest) beside it.

        >>> parts(512).halved(), parts(576).halved()
        (Parts(width=512, main=256, rest=256), Parts(width=576, main=256, rest=64))
        """
        return Parts(self.width, self.main // 2, self.rest or self.main // 2)


def parts(width: int) -> Parts:
    """96 is 64 + 32 and 192 is 128 + 64; but 112 is 128, since 64 + 64 would save nothing.

    >>> parts(576), parts(72), parts(112)
    (Parts(width=576, main=512, rest=64), Parts(width=72, main=64, rest=16), Parts(width=112, main=128, rest=0))
    """
    whole = max(LEAST, power_of_two(width))
    half = whole // 2
    rest = max(LEAST, power_of_two(width - half)) if width > half else whole
    return Parts(width, half, rest) if half >= LEAST and rest < half else Parts(width, whole, 0)


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
