"""Figures as a table for people and as JSON for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from attn_core.bench.measure import Peaks
from attn_core.bench.run import Figure
from attn_core.spec.decision import SCHEMA

_COLOURS = {"wrong": "red", "failed": "red", "refused": "yellow", "declared": "dim"}


def timed(figures: Sequence[Figure], title: str) -> Table:
    """One row per shape and backend that was timed."""
    out = Table(title=title, title_justify="left")
    for column in ("shape", "backend", "us a call", "spread", "us a plan", "GB/s", "GFLOP/s", "roofline", "of best"):
        out.add_column(column, overflow="fold", justify="left" if column in ("shape", "backend") else "right")
    previous = ""
    for f in figures:
        if f.call is None or f.plan is None:
            continue
        name, previous = (f.shape if f.shape != previous else ""), f.shape
        median, low, high = f.call
        out.add_row(
            name, f.backend, _us(median), f"{_us(low)} .. {_us(high)}", _us(f.plan[0]),
            f"{f.moved / median / 1e9:.3g}", f"{f.flops / median / 1e9:.3g}", f"{(f.roofline or 0):.0%}",
            f"{(f.versus_best or 0):.2f}",
        )  # fmt: skip
    return out


def others(figures: Sequence[Figure], statuses: Sequence[str]) -> Table | None:
    """Who was not timed, and why; the shapes of one reason together. None when there is nobody."""
    shapes: dict[tuple[str, str, str], list[str]] = {}
    for f in figures:
        if f.status in statuses:
            shapes.setdefault((f.backend, f.status, f.reason), []).append(f.shape)
    if not shapes:
        return None
    out = Table(title="not timed", title_justify="left")
    for column in ("backend", "", "shapes", "why"):
        out.add_column(column, overflow="fold")
    for (backend, status, reason), names in sorted(shapes.items()):
        out.add_row(backend, f"[{_COLOURS[status]}]{status}[/]", "; ".join(names), escape(reason))
    return out


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.4g}"


def to_json(figures: Sequence[Figure], peaks: Peaks, about: dict[str, Any]) -> dict[str, Any]:
    """``about``: device, versions, dtype, threads and what else a reader needs to trust the figures."""
    return {
        "schema": SCHEMA,
        **about,
        "peaks": {"copy_bytes_per_s": peaks.copy, "matmul_flop_per_s": peaks.matmul},
        "figures": [f.to_json() for f in figures],
    }
