"""What all benchmarks share: paired timing, results with spread and limit, and a refusal to judge on a busy machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Result:
    """One figure: the median of several runs, their spread, and what it must not exceed or fall below."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    limit: float | None = None
    at_most: bool = True
    note: str = ""

    @property
    def ok(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


def result(name: str, samples: Sequence[float], unit: str, **kwargs: object) -> Result:
    s = sorted(samples)
    return Result(name, statistics.median(s), unit, s[0], s[-1], **kwargs)  # type: ignore[arg-type]


def cpu_time(f: Callable[[], object], *, seconds: float = 0.2, rounds: int = 7) -> list[float]:
    """CPU seconds per call of this thread's process, one figure per round; insensitive to being descheduled."""
    f()
    start, n = time.process_time(), 0
    while time.process_time() - start < seconds / 10:
        f()
        n += 1
    n = max(1, n * 10)
    out = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(n):
            f()
        out.append((time.process_time() - start) / n)
    return out


def paired(fs: Sequence[Callable[[], object]], *, rounds: int = 9, least: float = 0.02) -> list[list[float]]:
    """Wall seconds per call of several functions, taken in turn (A B C A B C ...), after a warm-up of each."""
    repeats = []
    for f in fs:
        f()
        start = time.perf_counter()
        f()
        repeats.append(max(1, int(least / max(time.perf_counter() - start, 1e-9))))
    out: list[list[float]] = [[] for _ in fs]
    for _ in range(rounds):
        for i, (f, n) in enumerate(zip(fs, repeats)):
            start = time.perf_counter()
            for _ in range(n):
                f()
            out[i].append((time.perf_counter() - start) / n)
    return out


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """``b / a`` pair by pair: how many times faster a is than b, whatever the machine did in between."""
    return [y / x for x, y in zip(a, b)]


def busy() -> str | None:
    """Why figures taken now must not be judged, None when they may be."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    return f"load {load:.1f} exceeds the {cores} cores" if load > cores else None
