"""DSA: every query attends to the keys it was given positions of, and to no other.

Per query its keys are gathered, ``topk`` rows of them, so the cost does not grow with the context. Queries go in blocks
that keep the gathered rows within :data:`MAX_ELEMENTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.torch_native.scores import HAS_FUSED, fused_checking_mask, written_out
from attn_core.backends.torch_native.sources import BYTE_FLOATS
from attn_core.errors import BadInputError
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Capture

MAX_ELEMENTS = 1 << 23
"""Elements of k gathered at once: 32 MiB in float32."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Per query token of the step, on the device."""

    row: Tensor
    """int64 ``(tokens, 1)``: its sequence."""
    position: Tensor
    """int64 ``(tokens, 1)``: its place in the sequence."""
    table: Tensor
    """The block table."""


def bind(b: Binding) -> Kernels:
    """Decode and prefill alike, over k and v per head or over the latent cache.

    ``indices`` int32 ``(tokens, topk)``: key positions in the query's sequence, each at most once; -1 = none, and
    positions after the query's own are not seen either.
    """
    if b.page_size is None or b.kv_dtype is None:
        raise ValueError("sparse attention needs a group with a KV cache")
    page_size, heads, heads_kv, width = b.page_size, b.num_heads, b.num_kv_heads, b.v_head_dim
    absorbed, storage, scale = b.form == "absorbed", b.kv_dtype, b.scale
    uses_fused = HAS_FUSED and b.torch_device.type == "cpu" and (absorbed or b.head_dim == width)
    attend = fused_checking_mask if uses_fused else written_out(None)
    compute = b.dtype if uses_fused and storage == b.dtype else torch.float32
    joins_q = absorbed and b.mla_query == "split"
    own_plan = attrgetter(b.role)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> _Tokens:
        table, device = batch.block_table, batch.device
        if table is None:
            raise BadInputError("sparse attention reads a paged cache; the batch has no block_table")
        counts = batch.query_lens_device.long()
        row = torch.repeat_interleave(torch.arange(batch.num_seqs, device=device), counts, output_size=batch.num_tokens)
        place = torch.arange(batch.num_tokens, device=device) - batch.cu_query_lens_device.long()[row]
        position = (batch.kv_lens_device.long() - counts)[row] + place
        return _Tokens(row.unsqueeze(1), position.unsqueeze(1), table)

    def rows(cache: KVCache, page: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of ``(tokens, topk)`` keys as ``(tokens, kv heads, topk, width)``, scales left out."""
        found = []
        for t in (cache.k, cache.v) if not absorbed else (d.unsqueeze(2) for d in cache.data):
            got = (t.view(torch.uint8) if storage in BYTE_FLOATS else t)[page, place]
            found.append(got.view(storage).to(compute).transpose(1, 2))
        if not absorbed:
            return found[0], found[1]
        k = found[0] if len(found) == 1 else torch.cat(found, -1)
        return k, k if uses_fused else k[..., :width]

    def call(
        q: Any, k: Any, v: Any, kv_cache: KVCache, plan: Any, *,
        sinks: Any = None, indices: Tensor | None = None, bias: Any = None,
        out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        if indices is None:
            raise BadInputError("sparse attention needs indices=, int32 (tokens, topk) key positions, -1 = none")
        p: _Tokens = own_plan(plan)
        q = torch.cat(q, -1) if joins_q else q
        tokens = q.shape[0]
        out = q.new_empty(tokens, heads, width) if out is None else out
        lse = torch.empty(tokens, heads, device=q.device) if return_lse else None
        k_scale: Any = 1.0
        v_scale: Any = 1.0
        if storage.itemsize == 1:
            k_scale = kv_cache.k_scale_t.view(-1, 1, 1)
            v_scale = k_scale if absorbed else kv_cache.v_scale_t.view(-1, 1, 1)
        block = max(1, MAX_ELEMENTS // (indices.shape[1] * heads_kv * q.shape[-1]))
        for a in range(0, tokens, block):
            e = min(tokens, a + block)
            wanted = indices[a:e].long()
            seen = (wanted >= 0) & (wanted <= p.position[a:e])
            at = wanted.where(seen, 0)
            keys, values = rows(kv_cache, p.table[p.row[a:e], at // page_size].long(), at % page_size)
            hidden = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, float("-inf"))
            grouped = q[a:e].view(e - a, heads_kv, heads // heads_kv, -1).to(compute) * k_scale
            o, row_sums = attend(
                grouped.flatten(0, 1).unsqueeze(1), keys.flatten(0, 1).unsqueeze(1), values.flatten(0, 1).unsqueeze(1),
                hidden.repeat_interleave(heads_kv, 0)[:, None, None], False, scale,
            )  # fmt: skip
            o = o[..., :width].reshape(e - a, heads_kv, -1, width) * v_scale
            out[a:e] = o.reshape(e - a, heads, width)
            if lse is not None:
                lse[a:e] = row_sums.reshape(e - a, heads)
        return out if lse is None else (out, lse)

    return Kernels(plan=plan, call=call)
