"""Dual chunk attention by FlashAttention-3's paged call: a query's own chunk, the one before, and all earlier ones.

Rows are cut where their queries pass from one chunk to the next, so that a piece lies in one chunk. Each of the three
parts has key lengths and a block table of its own; pieces without a part have no keys in it, and a part that no piece
has is not called. Parts are merged by their LSE. Conventions as in :mod:`attn_plugin_cuda.kernels.flash`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import load
from attn_core.errors import BadInputError
from attn_core.runtime import Batch, Binding, Capture, Kernels, merge_state
from attn_core.runtime.lengths import cumulative
from attn_plugin_cuda.backends_flash import SGL_KERNEL

MODULE = "sgl_kernel.flash_attn"


@dataclass(frozen=True, slots=True)
class Part:
    """Keys that one of the three queries meets."""

    query: int
    """Which of the three."""
    kv_lens: Tensor
    """int32 ``(pieces,)``."""
    table: Tensor
    """int32 ``(pieces, pages)``."""


class Step:
    """One role's rows of one step, cut into pieces."""

    __slots__ = ("cu_query", "max_query", "parts")

    cu_query: Tensor
    """Cumulative query lengths of the pieces, int32 ``(pieces + 1,)``, on the device."""
    max_query: int
    parts: tuple[Part, ...]
    """The query's own chunk first, which every piece has."""


def cut(batch: Batch, chunk: int) -> tuple[list[int], list[int], Tensor]:
    """Pieces in order of tokens: the row of each, its queries, and on the host the keys up to its last query."""
    rows: list[int] = []
    lens: list[int] = []
    ends: list[int] = []
    for row, (n, end) in enumerate(zip(batch.lengths.queries, batch.lengths.keys)):
        at = end - n
        while at < end:
            upto = min(end, (at // chunk + 1) * chunk)
            rows.append(row)
            lens.append(upto - at)
            ends.append(upto)
            at = upto
    return rows, lens, torch.tensor(ends, dtype=torch.int32)


def bind(b: Binding) -> Kernels:
    attend = load(SGL_KERNEL, MODULE, "flash_attn_with_kvcache")
    step_of, page_size, scale = attrgetter(b.role), b.page_size or 1, b.scale
    chunk = b.spec.dual_chunk or 0
    pages = chunk // page_size
    splits = 1 if b.options.deterministic else 0

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        table = batch.block_table
        if table is None:
            raise BadInputError("dual_chunk_flash_attn attends over pages only: the batch needs its block_table")
        step = Step() if out is None else out
        step.cu_query, step.max_query, ends = batch.cu_query_lens_device, batch.max_query_len, batch.kv_lens
        if step.max_query > 1:
            rows, lens, ends = cut(batch, chunk)
            step.cu_query = cumulative(torch.tensor(lens, dtype=torch.int32)).to(table.device, non_blocking=True)
            step.max_query = max(lens)
            table = table.index_select(0, torch.tensor(rows).to(table.device, non_blocking=True))
        numbers = (ends - 1).floor_divide_(chunk)
        own = torch.sub(ends, numbers, alpha=chunk)
        lengths = torch.stack((own, numbers.clamp(max=1) * chunk, (numbers - 1).clamp_(min=0) * chunk, numbers))
        own_lens, before, earlier, number = lengths.to(table.device, non_blocking=True).unbind()
        first, last = number * pages, int(numbers.max())
        parts = [Part(0, own_lens, columns(table, first, -(-int(own.max()) // page_size)))]
        if last >= 1:
            parts.append(Part(1, before, columns(table, first - pages, pages)))
        if last >= 2:
            parts.append(Part(2, earlier, table))
        step.parts = tuple(parts)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        if type(q) is not tuple or len(q) != 3:
            raise BadInputError(
                "dual chunk attention takes three q: (for the own chunk, for the one before, for earlier ones), each "
                f"(tokens, heads, head_dim); got {type(q).__name__}"
            )
        step: Step = step_of(plan)
        alone = len(step.parts) == 1
        o: Any = None
        lse: Any = None
        for part in step.parts:
            got = attend(
                q[part.query], kv_cache.k, kv_cache.v, cache_seqlens=part.kv_lens, page_table=part.table,
                cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query, softmax_scale=scale, causal=part.query == 0,
                num_splits=splits, return_softmax_lse=return_lse or not alone, out=out if alone else None,
            )  # fmt: skip
            if alone:
                return (got[0], got[1].T) if return_lse else got
            if o is None:
                o, lse = got[0], got[1].T
            else:
                last = part is step.parts[-1]
                o, lse = merge_state(o, lse, got[0], got[1].T, out=out if last else None)
        return (o, lse) if return_lse else o

    return Kernels(plan=plan, call=call)


def columns(table: Tensor, first: Tensor, count: int) -> Tensor:
    """``count`` columns of every row from its ``first`` on; what lies outside the table is never read."""
    at = first.long().unsqueeze(1) + torch.arange(count, device=table.device)
    return table.gather(1, at.clamp_(0, table.shape[1] - 1))
