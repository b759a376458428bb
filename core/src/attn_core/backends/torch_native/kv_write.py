"""Role ``kv_write`` for the public layouts: put new keys at their slots, read stretches back.

A slot is ``page * page_size + place``; -1 is not written. Page 0 is the null page and stays zero. 8-bit caches hold
``value / scale``, rounded and clamped to what the dtype can hold; other dtypes hold the value and have no scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from attn_core.backends.torch_native.sources import BYTE_FLOATS
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Capture, ContextChunk


@dataclass(frozen=True, slots=True)
class _Slots:
    """Where this step's keys go. A key that is not written goes to place 0 of the null page as zeros, which are there
    already: so every step runs the same operations, without asking the device how many keys there are."""

    page: Tensor
    place: Tensor
    written: Tensor | None
    """bool ``(keys,)``; None where the host knows that all are."""


def bind(b: Binding) -> Kernels:
    """NHD and HND take k and v ``(keys, heads, width)``; MLA and MLA_SPLIT the latent ``(keys, latent)`` and the rotary
    part ``(keys, rope)``."""
    if b.page_size is None or b.kv_dtype is None:
        raise ValueError("kv_write needs a group with a KV cache")
    page_size, on_host = b.page_size, b.torch_device.type == "cpu"
    mla = b.kv_layout in ("MLA", "MLA_SPLIT")
    views = _VIEWS[b.kv_layout or "NHD"](b.spec.latent_dim or 0)
    to_storage, to_values = _conversions(b.kv_dtype, b.dtype)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> _Slots | None:
        slots = batch.slot_mapping
        if slots is None:
            return None
        written = slots >= 0
        if on_host and capture is None and bool(written.all()):
            return _Slots(slots // page_size, slots % page_size, None)
        real = slots.clamp(min=0)
        made = _Slots(real // page_size, real % page_size, written)
        if out is None or out.written is None or out.page.shape != slots.shape:
            return made
        for kept, new in ((out.page, made.page), (out.place, made.place), (out.written, written)):
            kept.copy_(new)  # a captured graph reads these addresses
        return cast("_Slots", out)

    def write(k: Tensor, v: Tensor, kv_cache: KVCache, plan: Any) -> None:
        s: _Slots = plan.write
        scales = (kv_cache.k_scale_t, kv_cache.k_scale_t if mla else kv_cache.v_scale_t)
        for new, target, scale in zip((k, v), views(kv_cache), scales):
            rows = new[: s.page.shape[0]].reshape(-1, *target.shape[2:])
            if s.written is not None:
                rows = rows.where(s.written.view(-1, *(1,) * (rows.dim() - 1)), 0)
            target.index_put_((s.page, s.place), to_storage(rows, scale))

    def gather(kv_cache: KVCache, plan: Any, chunk: ContextChunk) -> tuple[Tensor, Tensor]:
        """The chunk's rows in the group's dtype, scales applied."""
        page, place = chunk.slots // page_size, chunk.slots % page_size
        scales = (kv_cache.k_scale_t, kv_cache.k_scale_t if mla else kv_cache.v_scale_t)
        k, v = (to_values(source[page, place], scale) for source, scale in zip(views(kv_cache), scales))
        return k, v

    return Kernels(plan=plan, call=write, gather=gather)


# Each tensor to write as (pages, page, ...): indexing by (page, place) then works whatever the strides are.


def _heads(latent: int) -> Callable[[KVCache], tuple[Tensor, Tensor]]:
    return lambda cache: (_bytes(cache.k), _bytes(cache.v))


def _latent_row(latent: int) -> Callable[[KVCache], tuple[Tensor, Tensor]]:
    def views(cache: KVCache) -> tuple[Tensor, Tensor]:
        rows = _bytes(cache.data[0])
        return rows[..., :latent], rows[..., latent:]

    return views


def _latent_pair(latent: int) -> Callable[[KVCache], tuple[Tensor, Tensor]]:
    return lambda cache: (_bytes(cache.data[0]), _bytes(cache.data[1]))


_VIEWS = {"NHD": _heads, "HND": _heads, "MLA": _latent_row, "MLA_SPLIT": _latent_pair}


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype in BYTE_FLOATS else t


Convert = Callable[[Tensor, Tensor], Tensor]


def _conversions(storage: torch.dtype, dtype: torch.dtype) -> tuple[Convert, Convert]:
    """(values, scale) -> what is stored (floats of 8 bits as bytes), and back. Scales are ``()`` or per head."""
    if storage == torch.int8:
        return (
            lambda x, scale: (x.float() / _by_head(scale)).round_().clamp_(-128, 127).to(torch.int8),
            lambda x, scale: (x.float() * _by_head(scale)).to(dtype),
        )
    if storage in BYTE_FLOATS:
        top = torch.finfo(storage).max
        return (
            lambda x, scale: (x.float() / _by_head(scale)).clamp_(-top, top).to(storage).view(torch.uint8),
            lambda x, scale: (x.view(storage).float() * _by_head(scale)).to(dtype),
        )
    return lambda x, scale: x.to(storage), lambda x, scale: x.to(dtype)


def _by_head(scale: Tensor) -> Tensor:
    return scale.view(-1, 1) if scale.dim() else scale
