"""Seconds per call, several calls in turn; and what the device can do at best, measured beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attn_core.platform import Platform

ROUNDS = 7
LEAST = 0.03
"""Seconds that one sample takes at least, so that clocks and launches do not show."""


@dataclass(frozen=True)
class Peaks:
    """Measured, not from a data sheet: ``copy`` bytes/s (read plus written), ``matmul`` FLOP/s in the run's dtype."""

    copy: float
    matmul: float

    def bound(self, moved: float, flops: float) -> float:
        """Seconds that a perfect kernel would take: the roofline (Williams, Waterman, Patterson 2009)."""
        return max(moved / self.copy, flops / self.matmul)


def paired(
    calls: Sequence[Callable[[], object]],
    synchronize: Callable[[], None],
    *,
    rounds: int = ROUNDS,
    least: float = LEAST,
) -> list[list[float]]:
    """Wall seconds per call, one list per function, taken in turn so that all meet the same disturbances.

    The device is waited for before and after each sample, never between the calls of one.
    """
    repeats = []
    for call in calls:
        call()
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        repeats.append(max(1, int(least / max(time.perf_counter() - start, 1e-7))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i, (call, n) in enumerate(zip(calls, repeats)):
            synchronize()
            start = time.perf_counter()
            for _ in range(n):
                call()
            synchronize()
            samples[i].append((time.perf_counter() - start) / n)
    return samples


def peaks(platform: Platform, dtype: torch.dtype, *, copy_bytes: int, matmul_size: int) -> Peaks:
    """The best of several runs of a large copy and of a square matrix product."""
    device = platform.torch_device()
    source = torch.zeros(copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.ones(matmul_size, matmul_size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    copy, matmul = paired(
        (lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)), platform.synchronize, rounds=5
    )
    return Peaks(copy=2 * source.nbytes / min(copy), matmul=2 * matmul_size**3 / min(matmul))
