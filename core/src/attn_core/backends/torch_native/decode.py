"""Decode and verify rows over pages: per sequence a gather and one call over stretches of its keys, then joined."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.torch_native.one_tile import OL, joined, mask_of, one_tile, with_sinks
from attn_core.backends.torch_native.setup import Setup
from attn_core.backends.torch_native.steps import Feed, Step, planner
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache

Run = Callable[[Step, Tensor, KVCache, "Tensor | None", "Tensor | None", Tensor, "Tensor | None"], None]
"""``(step, q, kv_cache, sinks, bias, out, lse)``: fill ``out`` and ``lse``."""


def bind(b: Binding) -> Kernels:
    """``form='absorbed'``: over the latent cache."""
    s = Setup(b, paged=True, ragged=False, packed=True)
    own_plan = attrgetter(b.role)
    heads, width = s.heads, b.v_head_dim
    joins_q = s.absorbed and b.mla_query == "split"
    single, several = _one_query_each(s), _several_queries(s)

    def call(
        q: Any, k: Tensor | None, v: Tensor | None, kv_cache: KVCache, plan: Any, *,
        sinks: Tensor | None = None, indices: Tensor | None = None, bias: Tensor | None = None,
        out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = own_plan(plan)
        if joins_q:
            q = torch.cat(q, -1)
        if out is None:
            out = q.new_empty(q.shape[0], heads, width)
        lse = torch.empty(q.shape[0], heads, device=q.device) if return_lse else None
        (single if step.one_by_one else several)(step, q, kv_cache, sinks, bias, out, lse)
        return out if lse is None else (out, lse)

    return Kernels(plan=planner(s), call=call)


def _stretched(s: Setup) -> Callable[[Tensor, Feed, Tensor | None, KVCache], OL]:
    """One tile over its stretches of keys, ``(stretches, kv heads, rows, width)``. Where the tile has a mask, some rows
    may see nothing of some stretch."""
    seeing, maybe_blind = one_tile(s), one_tile(s, blind_rows=True)

    def attend(q: Tensor, feed: Feed, mask: Tensor | None, cache: KVCache) -> OL:
        cut: Any = feed.cut
        attend = seeing if feed.tile.mask is None else maybe_blind
        return attend(q.expand(cut.count, -1, -1, -1), feed.kv, cut.of_mask(mask), False, cache)

    return attend


def _one_query_each(s: Setup) -> Run:
    """The steady state of decoding, with the least work around the kernel."""
    heads, r, blind, has_sinks = s.heads_kv, s.packed_heads, s.b.spec.bias, s.b.spec.sinks
    attend, added = _stretched(s), mask_of(s)

    def run(
        step: Step, q: Tensor, cache: KVCache, sinks: Tensor | None, bias: Tensor | None, out: Tensor,
        lse: Tensor | None,
    ) -> None:  # fmt: skip
        reader: Any = step.paged
        sources, load = reader.sources(cache), reader.load
        queries = q.view(-1, 1, heads, r, q.shape[-1]).unbind()
        rows_out = out.view(-1, heads, r, out.shape[-1])
        taken = sinks.view(heads, r) if has_sinks and sinks is not None else None
        lse_wanted = lse is not None or taken is not None
        for group in step.groups:
            outputs: list[Tensor] = []
            sums: list[Tensor] = []
            for seq in group.sequences:
                for fetch in seq.fetches:
                    load(sources, fetch.pages)
                    feed = fetch.feeds[0]
                    o, row_sums = attend(queries[seq.row], feed, added(feed.tile, seq.row, bias), cache)
                    outputs.append(o)
                    sums.append(row_sums)
            o, row_sums = (outputs[0], sums[0]) if len(outputs) == 1 else (torch.cat(outputs), torch.cat(sums))
            size, count = len(group.sequences), group.count
            if count > 1 and size > 1:
                o, row_sums = o.view(size, count, heads, r, -1), row_sums.view(size, count, heads, r)
            if count > 1:
                o, row_sums = joined(o, row_sums, int(size > 1), blind=blind, lse_wanted=lse_wanted)
            if taken is not None:
                o, row_sums = with_sinks(o, row_sums, taken)
            here = rows_out if size == len(rows_out) else rows_out[group.first : group.first + size]
            here.copy_(o)
            if lse is not None:
                lse[group.first : group.first + size].view(size, heads, r).copy_(row_sums)

    return run


def _several_queries(s: Setup) -> Run:
    """Verify rows: a few new tokens per sequence, maybe in a tree."""
    heads, r, blind, has_sinks = s.heads_kv, s.packed_heads, s.b.spec.bias, s.b.spec.sinks
    attend, added = _stretched(s), mask_of(s)

    def run(
        step: Step, q: Tensor, cache: KVCache, sinks: Tensor | None, bias: Tensor | None, out: Tensor,
        lse: Tensor | None,
    ) -> None:  # fmt: skip
        reader: Any = step.paged
        sources = reader.sources(cache)
        taken = sinks.view(heads, 1, r) if has_sinks and sinks is not None else None
        for seq in step.sequences:
            (fetch,) = seq.fetches
            reader.load(sources, fetch.pages)
            for feed in fetch.feeds:
                t = feed.tile
                n, where = t.q1 - t.q0, slice(seq.token + t.q0, seq.token + t.q1)
                if t.kind == "empty":
                    out[where] = 0
                    if lse is not None:
                        lse[where] = float("-inf")
                    continue
                rows = q[where].view(n, heads, r, -1).transpose(0, 1).reshape(1, heads, n * r, -1)
                o, sums = attend(rows, feed, added(t, seq.row, bias), cache)
                if len(o) > 1:
                    o, sums = joined(o, sums, 0, blind=blind, lse_wanted=True)
                o, sums = o.view(heads, n, r, -1), sums.view(heads, n, r)
                if taken is not None:
                    o, sums = with_sinks(o, sums, taken)
                out[where].view(n, heads, r, -1).copy_(o.transpose(0, 1))
                if lse is not None:
                    lse[where].view(n, heads, r).copy_(sums.transpose(0, 1))

    return run
