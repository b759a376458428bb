"""Cached context of materialised MLA: cut into chunks that fit in memory once expanded, attended to and merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_core.errors import BadInputError
from attn_core.runtime.adapt import Attend
from attn_core.runtime.batch import Batch
from attn_core.runtime.plan import ContextChunk, Plan

if TYPE_CHECKING:
    from attn_core.runtime.bound import BoundGroup

CHUNK_TOKENS = 8192
"""Keys expanded at a time unless the caller says otherwise: 0.7 GB for 128 heads of 192 + 128 in bfloat16."""


def cut(
    plan: Plan, part: Batch, make: Callable[..., Any], page_size: int, chunk_tokens: int
) -> tuple[ContextChunk, ...]:
    """Chunks over the context of ``part`` (the prefill rows), at most ``chunk_tokens`` keys each.

    Every row with context gets an equal share of a chunk, in whole pages where the share allows one. ``make`` is the
    context kernel's plan; what it made for an earlier step of this plan is refilled.
    """
    context = part.kv_lens - part.query_lens
    longest, rows = int(context.max()), int((context > 0).sum())
    if longest <= 0 or part.block_table is None:
        return ()
    share = max(1, chunk_tokens // rows)
    share = share // page_size * page_size or share
    kept: list[Plan] = plan.kept.setdefault("context", [])
    chunks = []
    for i, start in enumerate(range(0, longest, share)):
        lens = (context - start).clamp_(0, share)
        batch = part.ragged(lens, causal=False)
        if i == len(kept):
            kept.append(Plan(plan.group, None))
        inner = kept[i]
        inner.prefill = make(batch, capture=None, out=inner.prefill)
        inner.batch = batch
        starts = torch.full_like(lens, start)
        chunks.append(
            ContextChunk(
                starts=starts, lens=lens, block_table=part.block_table, page_size=page_size, batch=batch, plan=inner
            )
        )
    return tuple(chunks)


def prefill_with_context(
    group: BoundGroup,
    attend_context: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Any,
    plan: Plan,
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    sinks: Any,
    out: Tensor | None,
    return_lse: bool,
) -> Any:
    """New tokens first (causal), then chunk after chunk of context (gather, expand, attend to all of it), merged.

    Partial results are kept in float32, so that many chunks round once.
    """
    if not plan.chunks:
        return group.prefill(q, k, v, kv_cache, plan, sinks=sinks, out=out, return_lse=return_lse)
    first = group.prefill(q, k, v, kv_cache, plan, sinks=sinks, return_lse=True)
    if not isinstance(first, tuple):
        raise BadInputError(
            f"group {group.name!r}: its prefill ({group.bindings['prefill'].backend}) returned no LSE, so cached "
            "context cannot be merged in; resolve with lse=True"
        )
    o, lse = first
    dtype, o = o.dtype, o.to(torch.promote_types(o.dtype, torch.float32))
    for chunk in plan.chunks:
        chunk_k, chunk_v = expand(*group.gather_kv(kv_cache, plan, chunk))
        part, part_lse = attend_context(q, chunk_k, chunk_v, None, chunk.plan, return_lse=True)
        o, lse = group.merge_state(o, lse, part, part_lse, out=o)
    o = o.to(dtype) if out is None else out.copy_(o)
    return (o, lse) if return_lse else o
