"""Rooflines: FLOP/s over arithmetic intensity, under the measured peaks. Needs matplotlib (extra ``bench``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from attn_core.bench.measure import Peaks
from attn_core.bench.run import Figure
from attn_core.errors import BadInputError


def require() -> None:
    """Raises :class:`BadInputError` where matplotlib is missing, before minutes are spent on measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInputError("--plot needs matplotlib: pip install 'attn-core[bench]'")


def draw(figures: Sequence[Figure], peaks: Peaks, title: str, path: Path) -> None:
    """Write the picture to ``path``; its ending names the format (png, svg, pdf)."""
    require()
    from matplotlib.figure import Figure as Canvas

    timed = [(f, f.call[0]) for f in figures if f.call is not None and f.moved]
    canvas = Canvas(figsize=(9, 6), layout="constrained")
    axes = canvas.subplots()
    at = [f.flops / f.moved for f, _ in timed] or [1.0]
    ends = [min(at) / 2, *sorted({peaks.matmul / peaks.copy}), max(*at, peaks.matmul / peaks.copy) * 2]
    axes.plot(ends, [min(peaks.matmul, x * peaks.copy) / 1e9 for x in ends], color="black", label="measured peaks")
    for backend in sorted({f.backend for f, _ in timed}):
        mine = [(f.flops / f.moved, f.flops / t / 1e9) for f, t in timed if f.backend == backend]
        axes.scatter(*zip(*mine), label=backend)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s", title=title)
    axes.legend()
    canvas.savefig(path)
