"""From shapes and backends to figures: bind, check, then time all who passed, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attn_core.bench import measure
from attn_core.bench.case import Case, build, candidates
from attn_core.bench.check import wrong
from attn_core.bench.measure import Peaks
from attn_core.bench.shapes import Shape
from attn_core.errors import AttnCoreError, BindError, NoBackendError
from attn_core.platform import Platform

STATUSES = ("ok", "wrong", "failed", "refused", "declared")
TROUBLE = ("wrong", "failed")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One backend on one shape. Times in seconds, ``(median, lowest, highest)``; None unless ``status`` is ``ok``."""

    shape: str
    kind: str
    backend: str
    status: str
    """``ok``; ``wrong``: the answer is; ``failed``: it raised; ``refused``: not eligible; ``declared``: no kernels."""
    reason: str = ""
    digest: str = ""
    call: tuple[float, float, float] | None = None
    plan: tuple[float, float, float] | None = None
    moved: int = 0
    """Bytes that must move at least."""
    flops: int = 0
    roofline: float | None = None
    """Share of what the measured peaks allow; may pass 1 for data that fits the caches."""
    versus_best: float | None = None
    """The fastest backend's time over this one's; 1 for the fastest."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def figures(
    platform: Platform,
    shapes: Sequence[Shape],
    backends: Sequence[str],
    peaks: Peaks,
    *,
    kv_cache_dtype: str | None = None,
    rounds: int = measure.ROUNDS,
    least: float = measure.LEAST,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Figure]]:
    """One list per shape. ``backends`` empty: every one that is declared for the role on this device."""
    for shape in shapes:
        cases: dict[str, Case] = {}
        out: dict[str, Figure] = {}
        for backend in backends or candidates(platform, shape.role):
            progress(f"{shape.name}: {backend}")
            made = _prepare(platform, shape, backend, kv_cache_dtype)
            if isinstance(made, Figure):
                out[backend] = made
            else:
                cases[backend] = made
        progress(f"{shape.name}: timing {', '.join(cases) or 'nobody'}")
        out.update(_time(platform, cases, peaks, rounds, least))
        yield sorted(out.values(), key=lambda f: (STATUSES.index(f.status), f.call or (0.0,), f.backend))


def _prepare(platform: Platform, shape: Shape, backend: str, kv_cache_dtype: str | None) -> Case | Figure:
    def verdict(status: str, reason: str) -> Figure:
        return Figure(shape=shape.name, kind=shape.kind, backend=backend, status=status, reason=reason)

    try:
        case = build(platform, shape, backend, kv_cache_dtype=kv_cache_dtype)
        found = wrong(case)
    except NoBackendError as e:
        mine = [r.text for r in e.rejections if r.backend == backend]
        return verdict("refused", "; ".join(dict.fromkeys(mine)) or e.text)
    except BindError as e:
        return verdict("declared", str(e))
    except (AttnCoreError, RuntimeError, ValueError, TypeError, NotImplementedError) as e:  # one kernel, not the run
        return verdict("failed", f"{type(e).__name__}: {e}")
    return verdict("wrong", "; ".join(found)) if found else case


def _time(
    platform: Platform, cases: dict[str, Case], peaks: Peaks, rounds: int, least: float
) -> Iterator[tuple[str, Figure]]:
    if not cases:
        return
    calls = [f for c in cases.values() for f in (c.call, c.replan)]
    samples = measure.paired(calls, platform.synchronize, rounds=rounds, least=least)
    best = min(statistics.median(s) for s in samples[::2])
    for (name, case), call, plan in zip(cases.items(), samples[::2], samples[1::2]):
        moved, flops = case.shape.moved(case.absorbed, case.kv_bytes), case.shape.flops(case.absorbed)
        median = statistics.median(call)
        yield name, Figure(
            shape=case.shape.name, kind=case.shape.kind, backend=name, status="ok", digest=case.digest,
            call=_spread(call), plan=_spread(plan), moved=moved, flops=flops,
            roofline=peaks.bound(moved, flops) / median, versus_best=best / median,
        )  # fmt: skip


def _spread(samples: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(samples), min(samples), max(samples)
