"""The fp8 cache of DeepSeek V3.2 (layout DSA_FP8): 656 bytes a token, as FlashMLA's sparse decode reads them.

512 bytes of float8_e4m3 latents in four blocks of 128, four float32 scales of the blocks, 64 bfloat16 rotary values.
Source: FlashMLA README; vLLM concat_and_cache_mla (fp8_ds_mla).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_core.runtime import Batch, Binding, Capture, Kernels

ROW_BYTES, LATENT, BLOCK = 656, 512, 128
TOP = torch.finfo(torch.float8_e4m3fn).max


def encode(latent: Tensor, rope: Tensor) -> Tensor:
    """``(tokens, 512)`` and ``(tokens, 64)`` as rows of bytes, uint8 ``(tokens, 656)``."""
    blocks = latent.float().reshape(*latent.shape[:-1], -1, BLOCK)
    scales = (blocks.abs().amax(-1) / TOP).clamp(min=torch.finfo(torch.float32).tiny)
    values = (blocks / scales[..., None]).clamp(-TOP, TOP).to(torch.float8_e4m3fn).flatten(-2)
    parts = (values, scales, rope.to(torch.bfloat16).contiguous())
    return torch.cat([t.view(torch.uint8) for t in parts], -1)


def decode(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of bytes as latents with their rotary part, ``(tokens, 576)``."""
    scale_bytes = 4 * LATENT // BLOCK
    values, scales, rope = torch.split_with_sizes(rows, (LATENT, scale_bytes, ROW_BYTES - LATENT - scale_bytes), -1)
    blocks = values.contiguous().view(torch.float8_e4m3fn).float().reshape(*rows.shape[:-1], -1, BLOCK)
    latent = (blocks * scales.contiguous().view(torch.float32)[..., None]).flatten(-2)
    return torch.cat([latent.to(dtype), rope.contiguous().view(torch.bfloat16).to(dtype)], -1)


class Slots:
    """Where a step's new tokens go, at fixed addresses where a graph was captured."""

    __slots__ = ("slots", "written")

    slots: Tensor
    """int64 ``(tokens,)``: cache rows; what is not to be written goes to the first row of the null page, as zeros."""
    written: Tensor
    """bool ``(tokens, 1)``."""

    def fill(self, slot_mapping: Tensor, *, captured: bool) -> None:
        slots, written = slot_mapping.clamp(min=0), (slot_mapping >= 0)[:, None]
        if captured and hasattr(self, "slots"):
            self.slots.copy_(slots)
            self.written.copy_(written)
        else:
            self.slots, self.written = slots, written


def writer(b: Binding) -> Kernels:
    """Role ``kv_write``."""
    page_size, device, dtype = b.page_size or 1, b.torch_device, b.dtype

    def plan(batch: Batch, *, capture: Capture | None = None, out: Slots | None = None) -> Slots:
        step = Slots() if out is None else out
        if batch.slot_mapping is None:
            raise ValueError("a writer was planned with a batch that has no slot_mapping")
        step.fill(batch.slot_mapping, captured=capture is not None)
        return step

    def call(k: Any, v: Any, kv_cache: Any, plan: Any) -> None:
        step = plan.write
        rows = encode(k, v)
        kv_cache.data[0].flatten(0, 1).index_copy_(0, step.slots, rows.where(step.written, 0))

    def gather(kv_cache: Any, plan: Any, chunk: Any) -> tuple[Tensor, Tensor]:
        found = decode(kv_cache.data[0].flatten(0, 1)[chunk.slots], dtype)
        return found[..., :LATENT], found[..., LATENT:]

    def allocate(num_pages: int) -> tuple[Tensor]:
        return (torch.zeros(num_pages, page_size, ROW_BYTES, dtype=torch.uint8, device=device),)

    return Kernels(plan=plan, call=call, gather=gather, allocate=allocate)
