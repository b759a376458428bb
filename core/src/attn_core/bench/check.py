"""Is the answer right? Some queries of some sequences against float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attn_core.bench.case import Case
from attn_core.bench.shapes import Shape
from attn_core.testing.compare import differences
from attn_core.testing.reference import attend

ULPS = 8.0
"""Units in the last place that half-precision kernels may be off on sums of thousands of products."""


def wrong(case: Case) -> list[str]:
    """What is wrong with the case's output; empty when nothing is. Looks at the first and last query, and one between,
    of the first, middle and last sequence."""
    got, s = case.call(), case.shape.spec
    found = []
    for i, tokens, keys, positions in _samples(case.shape):
        k, v = _keys(case, keys)
        n, m = case.shape.query_lens[i], case.shape.kv_lens[i]
        seen = torch.ones(len(positions), m, dtype=torch.bool)
        if s.attn_type == "decoder":
            seen &= torch.arange(m)[None, :] <= (torch.tensor(positions) + m - n)[:, None]
        want, _ = attend(case.inputs.q[tokens], k, v, seen, scale=case.group.scale)
        found += [f"sequence {i}: {w}" for w in differences(got[tokens], want, got.dtype, ulps=ULPS)]
    return found


def _samples(shape: Shape) -> Iterator[tuple[int, Tensor, slice, list[int]]]:
    """(sequence, its sampled rows of q, its keys, the rows' places among its new tokens)."""
    last = len(shape.query_lens) - 1
    for i in sorted({0, last // 2, last}):
        token, key = sum(shape.query_lens[:i]), sum(shape.kv_lens[:i])
        n = shape.query_lens[i]
        positions = sorted({0, n // 2, n - 1})
        yield i, torch.tensor([token + p for p in positions]), slice(key, key + shape.kv_lens[i]), positions


def _keys(case: Case, rows: slice) -> tuple[Tensor, Tensor]:
    """k and v as the cache holds them: rounded to its dtype; latent rows are key and value at once."""
    k, v = (_stored(t[rows], case) for t in (case.inputs.k, case.inputs.v))
    if not case.absorbed:
        return k, v
    return torch.cat([k, v], -1)[:, None], k[:, None]


def _stored(t: Tensor, case: Case) -> Tensor:
    stored = case.group.kv_dtype
    if not case.reads_cache or stored is None or stored == t.dtype:
        return t
    if not stored.is_floating_point:
        return t.float().round().clamp(-128, 127)
    return t.float().clamp(*(getattr(torch.finfo(stored), x) for x in ("min", "max"))).to(stored).float()
