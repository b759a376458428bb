"""FlashMLA's dense decode on Hopper: sgl-flash-mla's legacy kernels over 16-bit and fp8 caches, vLLM's over fp8 ones.

The schedule depends on the lengths, so it is worked out in every plan and lies on it, at fixed addresses where a graph
was captured. Left to itself the first layer of a step would fill it, and a captured graph could keep one of the past.

Conventions: queries and outputs are (batch, queries, heads, width), the cache (pages, 64, 1, 576); causality must be
asked for; LSE is natural log, (batch, heads, queries), and always returned. An fp8 cache wants q in fp8, answers in
bfloat16, and has one scale: descale_q and descale_k are float32 (1,), both required.

Sources: sgl-flash-mla 1.0.0 flash_mla_interface.py and the checks in its _C_legacy; vLLM 0.33.0
v1/attention/ops/flashmla.py, mla/flashmla.py (descales reshaped to (1,)); vllm-project/FlashMLA 46d64a8e
csrc/extension/sm90/dense_fp8/pybind.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Paged, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends_mla import FLASH_MLA, VLLM_MLA


class Step(Paged):
    """Pages and lengths, with the schedule made for them."""

    __slots__ = ("schedule", "splits", "tiles")

    tiles: Tensor | None
    splits: Tensor
    schedule: tuple[Any, ...]
    """Both, as the kernel takes them."""

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.tiles = None

    def take(self, tiles: Tensor, splits: Tensor) -> None:
        if self.capture is None or self.tiles is None:
            self.tiles, self.splits = tiles, splits
        else:
            self.tiles.copy_(tiles)
            self.splits.copy_(splits)


def bind(b: Binding) -> Kernels:
    attend, empty, get_metadata = load(
        FLASH_MLA, "flash_mla", "flash_mla_with_kvcache", "get_mla_metadata", "get_mla_decoding_metadata"
    )
    always = {"is_fp8_kvcache": b.kv_dtype == torch.float8_e4m3fn, "use_legacy": True}

    def scheduled(step: Step) -> tuple[Any]:
        made = empty()[0]
        made.tile_scheduler_metadata, made.num_splits = step.tiles, step.splits
        return (made,)

    return _dense(b, attend, lambda *args: get_metadata(*args, **always), scheduled, always)


def bind_vllm(b: Binding) -> Kernels:
    """Over fp8 caches."""
    attend, get_metadata = load(
        VLLM_MLA, "vllm.v1.attention.ops.flashmla", "flash_mla_with_kvcache_fp8", "get_mla_metadata_dense_fp8"
    )
    return _dense(b, attend, get_metadata, lambda step: (step.tiles, step.splits), {})


def _dense(
    b: Binding,
    attend: Callable[..., Any],
    get_metadata: Callable[[Tensor, int, int], tuple[Tensor, Tensor]],
    scheduled: Callable[[Step], tuple[Any, ...]],
    always: dict[str, bool],
) -> Kernels:
    page_size, scale, latent, heads = b.page_size or 1, b.scale, b.v_head_dim, b.num_heads
    width, limit = b.head_dim, torch.finfo(torch.float8_e4m3fn).max
    fp8 = b.kv_dtype == torch.float8_e4m3fn
    one = torch.ones(1, dtype=torch.float32, device=b.torch_device)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(page_size, capture) if out is None else out
        step.fill(batch)
        step.take(*get_metadata(step.kv_lens, step.max_query * heads, 1))
        step.schedule = scheduled(step)
        return step

    def views(kv_cache: Any) -> tuple[Tensor, Tensor]:
        """The cache with four axes, and its scale with one."""
        made = kv_cache.memo["flashmla"] = (kv_cache.data[0].unsqueeze(2), kv_cache.k_scale_t.reshape(1))
        return made

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, (rows, _) = plan.decode, kv_cache.memo.get("flashmla") or views(kv_cache)
        o, lse = attend(
            q.view(step.rows, step.max_query, heads, width), rows, step.table, step.kv_lens, latent, *step.schedule,
            softmax_scale=scale, causal=True, **always,
        )  # fmt: skip
        o = o.view(-1, heads, latent)
        return (o, lse.transpose(1, 2).flatten(0, 1)) if return_lse else o

    def call_fp8(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, (rows, stored) = plan.decode, kv_cache.memo.get("flashmla") or views(kv_cache)
        q = q.clamp(-limit, limit).to(torch.float8_e4m3fn)
        o, lse = attend(
            q.view(step.rows, step.max_query, heads, width), rows, step.table, step.kv_lens, latent, *step.schedule,
            softmax_scale=scale, causal=True, descale_q=one, descale_k=stored, **always,
        )  # fmt: skip
        o = o.view(-1, heads, latent)
        return (o, lse.transpose(1, 2).flatten(0, 1)) if return_lse else o

    return Kernels(plan=plan, call=call_fp8 if fp8 else call)
