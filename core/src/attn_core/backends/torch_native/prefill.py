"""Prefill and encode: any number of queries per sequence, tile by tile, over pages or over k and v as they are."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.torch_native.one_tile import mask_of, one_tile, with_sinks
from attn_core.backends.torch_native.setup import Setup
from attn_core.backends.torch_native.sources import COMPACT_FROM, Given, narrowed
from attn_core.backends.torch_native.steps import Feed, Sequence, Step, planner
from attn_core.backends.torch_native.tiles import Tile
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache


def bind(b: Binding) -> Kernels:
    """Paged prefill. A sequence without cached prefix takes its new k and v as they are, where the cache holds them
    unrounded; with ``form='materialised'`` all do."""
    if b.form == "materialised":
        return _kernels(Setup(b, paged=False, ragged=True, packed=False))
    unrounded = b.kv_dtype == b.dtype and b.spec.causal and b.form is None
    return _kernels(Setup(b, paged=True, ragged=unrounded, packed=False))


def bind_encode(b: Binding) -> Kernels:
    """Ragged attention without a cache."""
    return _kernels(Setup(b, paged=False, ragged=True, packed=False))


def _kernels(s: Setup) -> Kernels:
    own_plan = attrgetter(s.b.role)
    heads_kv, group = s.axes
    width, has_sinks = s.b.v_head_dim, s.b.spec.sinks
    joins_q = s.absorbed and s.b.mla_query == "split"
    attend, added = one_tile(s), mask_of(s)
    plain = s.fused and s.planes == 1 and s.b.dtype == s.dtype and s.q_width == s.b.head_dim == width
    batches = plain and group == 1 and not (s.paged or s.quantised or has_sinks or joins_q)
    """Heads share nothing and nothing is added to scores: sequences alike go through the kernel together."""

    def together(t: Tile, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """All sequences at once, a batch of ``t.q1`` queries and ``t.k1`` keys each."""
        rows, keys, values, results = (
            x.view(-1, n, x.shape[1], x.shape[2]).transpose(1, 2)
            for x, n in ((q, t.q1), (k, t.k1), (v, t.k1), (out, t.q1))
        )
        o, sums = attend(rows, (keys, values), None, t.kind == "causal", None)
        results.copy_(o)
        if lse is not None:
            lse.view(-1, t.q1, lse.shape[1]).transpose(1, 2).copy_(sums)

    def call(
        q: Any, k: Tensor | None, v: Tensor | None, kv_cache: KVCache | None, plan: Any, *,
        sinks: Tensor | None = None, indices: Tensor | None = None, bias: Tensor | None = None,
        out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = own_plan(plan)
        if joins_q:
            q = torch.cat(q, -1)
        if out is None:
            out = q.new_empty(q.shape[0], s.heads, width)
        lse = torch.empty(q.shape[0], s.heads, device=q.device) if return_lse else None
        if batches and step.alike is not None and step.alike.k1 < COMPACT_FROM and k is not None and v is not None:
            together(step.alike, q, k, v, out, lse)
            return out if lse is None else (out, lse)
        taken = sinks.view(heads_kv, group, 1) if has_sinks and sinks is not None else None
        sources = None if step.paged is None or kv_cache is None else step.paged.sources(kv_cache)
        given = None if step.ragged is None or k is None or v is None else step.ragged.given((k, v))
        all_rows = q.view(-1, heads_kv, group, q.shape[-1]).permute(1, 2, 0, 3)
        all_out = out.view(-1, heads_kv, group, width).permute(1, 2, 0, 3)
        for seq in step.sequences:
            for feed in _fed(step, seq, given, sources):
                t = feed.tile
                n, where = t.q1 - t.q0, slice(seq.token + t.q0, seq.token + t.q1)
                if t.kind == "empty":
                    out[where] = 0
                    if lse is not None:
                        lse[where] = float("-inf")
                    continue
                rows = all_rows.narrow(2, where.start, n)
                if n >= COMPACT_FROM:
                    rows = step.scratch.take("queries", q.dtype, *rows.shape).copy_(rows)
                o, sums = attend(rows, feed.kv, added(t, seq.row, bias), t.kind == "causal", kv_cache)
                if taken is not None:
                    o, sums = with_sinks(o, sums, taken)
                all_out.narrow(2, where.start, n).copy_(o)
                if lse is not None:
                    lse[where].view(n, heads_kv, group).permute(1, 2, 0).copy_(sums)
        return out if lse is None else (out, lse)

    return Kernels(plan=planner(s), call=call)


def _fed(step: Step, seq: Sequence, given: Given | None, sources: Any) -> list[Feed]:
    """The sequence's tiles with their k and v in place."""
    if seq.direct and given is not None:
        kv = given(seq.key, seq.key + seq.kv_len)
        return [Feed(t, narrowed(kv, t.k0, t.k1)) for t in seq.tiles]
    paged: Any = step.paged
    (fetch,) = seq.fetches
    paged.load(sources, fetch.pages)
    return fetch.feeds
