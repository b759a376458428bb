"""Role ``kv_write`` for the public layouts: one launch writes k and v of all new keys, one reads a stretch back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.triton.pages import gather, write
from attn_core.backends.triton.widths import power_of_two
from attn_core.errors import AttnCoreError
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Capture, ContextChunk

ELEMENTS = 4096
"""Of k, per program."""

Target = tuple[Tensor, Tensor, tuple[int, ...]]
"""Where k and v go, and the strides of (page, place, head) of both."""


def bind(b: Binding) -> Kernels:
    """NHD and HND take k and v ``(keys, heads, width)``; MLA and MLA_SPLIT the latent ``(keys, latent)`` and the rotary
    part ``(keys, rope)``, which share the k scale."""
    if b.page_size is None or b.kv_dtype is None:
        raise AttnCoreError("triton kv_write: the group has no KV cache")
    mla = b.kv_layout in ("MLA", "MLA_SPLIT")
    widths = (b.spec.latent_dim or 0, b.spec.rope_dim or 0) if mla else (b.head_dim, b.v_head_dim)
    heads, target, dtype = 1 if mla else b.num_kv_heads, _target(b), b.dtype
    k_width, v_width = widths
    block_h = min(power_of_two(heads), max(1, ELEMENTS // power_of_two(max(widths))))
    blocks = -(-heads // block_h)
    quantised = b.kv_dtype.itemsize == 1
    sizes: dict[str, Any] = {
        "HEADS": heads, "PAGE": b.page_size, "K_WIDTH": k_width, "K_BLOCK": power_of_two(k_width), "V_WIDTH": v_width,
        "V_BLOCK": power_of_two(v_width), "BLOCK_H": block_h,
    }  # fmt: skip
    integer = b.kv_dtype == torch.int8
    lowest, highest = 0.0, 0.0
    if quantised:
        info = torch.iinfo(b.kv_dtype) if integer else torch.finfo(b.kv_dtype)
        lowest, highest = float(info.min), float(info.max)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> Tensor | None:
        slots = batch.slot_mapping
        if slots is None or capture is None:
            return slots
        kept: Tensor = slots.clone() if out is None else out.copy_(slots)  # a captured graph reads this address
        return kept

    def scales(cache: KVCache) -> tuple[Tensor, Tensor]:
        return cache.k_scale_t, cache.k_scale_t if mla else cache.v_scale_t

    def call(k: Tensor, v: Tensor, kv_cache: KVCache, plan: Any) -> None:
        slots: Tensor = plan.write
        k_cache, v_cache, strides = target(kv_cache)
        k_scale, v_scale = scales(kv_cache)
        if mla:
            k, v = k.reshape(-1, 1, k_width), v.reshape(-1, 1, v_width)
        if len(slots):
            write[(len(slots) * blocks,)](
                k, v, k_cache, v_cache, slots, k_scale, v_scale, *k.stride()[:2], *v.stride()[:2], *strides,
                k_scale.dim(), v_scale.dim(), LOWEST=lowest, HIGHEST=highest, INTEGER=integer, **sizes,
            )  # fmt: skip

    def read(kv_cache: KVCache, plan: Any, chunk: ContextChunk) -> tuple[Tensor, Tensor]:
        """The chunk's rows in the group's dtype, scales applied."""
        slots = chunk.slots
        k_cache, v_cache, strides = target(kv_cache)
        k_scale, v_scale = scales(kv_cache)
        k, v = (torch.empty(len(slots), heads, w, dtype=dtype, device=slots.device) for w in widths)
        if len(slots):
            gather[(len(slots) * blocks,)](
                k, v, k_cache, v_cache, slots, k_scale, v_scale, *strides, k_scale.dim(), v_scale.dim(),
                QUANTISED=quantised, **sizes,
            )  # fmt: skip
        return (k.squeeze(1), v.squeeze(1)) if mla else (k, v)

    return Kernels(plan=plan, call=call, gather=read)


def _target(b: Binding) -> Callable[[KVCache], Target]:
    latent = b.spec.latent_dim or 0

    def heads(cache: KVCache) -> Target:
        return cache.k, cache.v, (*cache.k.stride()[:3], *cache.v.stride()[:3])

    def row(cache: KVCache) -> Target:
        (rows,) = cache.data
        strides = (*rows.stride()[:2], 0)
        return rows, rows[..., latent:], (*strides, *strides)

    def pair(cache: KVCache) -> Target:
        k, v = cache.data
        return k, v, (*k.stride()[:2], 0, *v.stride()[:2], 0)

    return {"MLA": row, "MLA_SPLIT": pair}.get(b.kv_layout or "NHD", heads)
