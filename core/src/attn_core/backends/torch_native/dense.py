"""Attention over a sequence's whole visible context: decode, prefill and encode, paged or ragged."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.torch_native.one_tile import finish, mask_of, merged, one_tile
from attn_core.backends.torch_native.setup import Setup
from attn_core.backends.torch_native.sources import COMPACT_FROM, narrowed
from attn_core.backends.torch_native.steps import Sequence, Step, planner
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache

Run = Callable[[Step, Tensor, Any, Any, Any, Any, "Tensor | None", Tensor, "Tensor | None"], None]
"""``(step, q, k, v, kv_cache, sinks, bias, out, lse)``: fill ``out`` and ``lse``."""


def bind_decode(b: Binding) -> Kernels:
    """Paged decode and verify rows; with ``form='absorbed'`` on the latent cache."""
    return _kernels(Setup(b, paged=True, ragged=False, packed=True))


def bind_prefill(b: Binding) -> Kernels:
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
    heads, width = s.heads, s.b.v_head_dim
    joins_q = s.absorbed and s.b.mla_query == "split"
    one_by_one, tile_by_tile = _one_by_one(s), _tile_by_tile(s)

    def call(
        q: Any, k: Tensor | None, v: Tensor | None, kv_cache: KVCache | None, plan: Any, *,
        sinks: Tensor | None = None, indices: Tensor | None = None, bias: Tensor | None = None,
        out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = own_plan(plan)
        if joins_q:
            q = torch.cat(q, -1)
        if out is None:
            out = q.new_empty(q.shape[0], heads, width)
        lse = torch.empty(q.shape[0], heads, device=q.device) if return_lse else None
        run = one_by_one if step.one_by_one else tile_by_tile
        run(step, q, k, v, kv_cache, sinks, bias, out, lse)
        return out if lse is None else (out, lse)

    return Kernels(plan=planner(s), call=call)


def _one_by_one(s: Setup) -> Run:
    """One query per sequence: the steady state of decoding, with the least work around the kernel."""
    a, lanes, r = s.heads_kv, s.lanes, s.packed_heads
    attend, done, added = one_tile(s), finish(s), mask_of(s)

    def run(
        step: Step, q: Tensor, k: Any, v: Any, cache: Any, sinks: Any, bias: Tensor | None, out: Tensor,
        lse: Tensor | None,
    ) -> None:  # fmt: skip
        reader: Any = step.paged
        sources, load = reader.sources(cache), reader.load
        queries = q.view(-1, a, lanes, r, q.shape[-1]).unbind()
        outputs = out.view(-1, a, lanes, r, out.shape[-1]).unbind()
        sums = (None,) * len(outputs) if lse is None else lse.view(-1, a, lanes, r).unbind()
        for seq, q4, o4, lse3 in zip(step.sequences, queries, outputs, sums):
            parts = []
            for fetch in seq.fetches:
                load(sources, fetch.pages)
                tile, kv = fetch.tiles[0]
                parts.append(attend(q4, kv, added(tile, seq.row, bias), False, cache))
            o, row_sums = done(*(parts[0] if len(parts) == 1 else merged(parts)), sinks)
            o4.copy_(o)
            if lse3 is not None:
                lse3.copy_(row_sums)

    return run


def _tile_by_tile(s: Setup) -> Run:
    """Any number of queries per sequence; each tile sees all of its queries' keys."""
    a, lanes, r = s.heads_kv, s.lanes, s.packed_heads
    attend, done, added = one_tile(s), finish(s), mask_of(s)

    def fed(step: Step, seq: Sequence, k: Any, v: Any, sources: Any) -> Any:
        """The sequence's tiles with their k and v in place."""
        if seq.direct and k is not None:
            ragged: Any = step.ragged
            kv = ragged.load((k, v), seq.key, seq.key + seq.kv_len)
            return [(t, narrowed(kv, t.k0, t.k1)) for t in seq.tiles]
        paged: Any = step.paged
        (fetch,) = seq.fetches
        paged.load(sources, fetch.pages)
        return fetch.tiles

    def run(
        step: Step, q: Tensor, k: Any, v: Any, cache: Any, sinks: Any, bias: Tensor | None, out: Tensor,
        lse: Tensor | None,
    ) -> None:  # fmt: skip
        sources = None if step.paged is None else step.paged.sources(cache)
        for seq in step.sequences:
            for t, kv in fed(step, seq, k, v, sources):
                n, where = t.q1 - t.q0, slice(seq.token + t.q0, seq.token + t.q1)
                if t.kind == "empty":
                    out[where] = 0
                    if lse is not None:
                        lse[where] = float("-inf")
                    continue
                q4 = q[where].view(n, a, lanes, r, -1).permute(1, 2, 0, 3, 4).reshape(a, lanes, n * r, -1)
                if n >= COMPACT_FROM:
                    q4 = step.scratch.take("queries", q.dtype, *q4.shape).copy_(q4)
                o, sums = done(*attend(q4, kv, added(t, seq.row, bias), t.kind == "causal", cache), sinks)
                out[where].view(n, a, lanes, r, -1).permute(1, 2, 0, 3, 4).copy_(o.view(a, lanes, n, r, -1))
                if lse is not None:
                    lse[where].view(n, a, lanes, r).permute(1, 2, 0, 3).copy_(sums.view(a, lanes, n, r))

    return run
