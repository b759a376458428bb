"""FlashAttention-3 as sglang-kernel builds it (``sgl_kernel.flash_attn``), Hopper only.

Conventions: windows are (left, right) without the token itself; causality is aligned to the bottom right; LSE is
natural log, (heads, tokens) for packed queries; sinks are bfloat16 (heads,); an fp8 cache wants q in fp8 and answers in
bfloat16; MLA runs as q.k over the rotary part plus qv.v over the latent.

Scheduler metadata is computed once per step for this group's own heads, windows and lengths, and lies on its plan.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Paged, Ragged, both_sides, load, refilled
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends_flash import SGL_KERNEL

MODULE = "sgl_kernel.flash_attn"


def bind(b: Binding) -> Kernels:
    if b.form == "absorbed":
        return _absorbed(b)
    if b.form == "materialised" or b.kv_layout is None:
        return _ragged(b)
    return _paged(b)


def prepare_sinks(sinks: Tensor) -> Tensor:
    return sinks.to(torch.bfloat16).contiguous()


def _splits(b: Binding) -> int:
    """1: one order of additions whatever else is in the batch; 0: the kernel's own choice."""
    return 1 if b.options.deterministic else 0


class Step(Paged):
    """Adds what the kernel's scheduler works out once per step."""

    __slots__ = ("metadata",)

    metadata: Tensor | None

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.metadata = None

    def schedule(self, made: Tensor) -> None:
        if self.capture is None or self.metadata is None:
            self.metadata = made
        else:
            self.metadata.copy_(made)


def _paged(b: Binding) -> Kernels:
    attend, get_metadata = load(SGL_KERNEL, MODULE, "flash_attn_with_kvcache", "get_scheduler_metadata")
    step_of, fp8 = attrgetter(b.role), b.kv_dtype == torch.float8_e4m3fn
    heads, kv_heads, page_size = b.num_heads, b.num_kv_heads, b.page_size or 1
    scale, causal, window, splits = b.scale, b.spec.causal, both_sides(b), _splits(b)
    chunk, softcap = b.spec.attention_chunk or 0, b.spec.logit_softcap or 0.0
    limit = torch.finfo(torch.float8_e4m3fn).max

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(page_size, capture) if out is None else out
        step.fill(batch)
        if b.role == "decode":
            step.schedule(
                get_metadata(
                    step.rows, step.max_query, step.max_kv, heads, kv_heads, b.head_dim, step.kv_lens,
                    qkv_dtype=b.kv_dtype, headdim_v=b.v_head_dim, cu_seqlens_q=step.cu_query, page_size=page_size,
                    causal=causal, window_size=window, attention_chunk=chunk, has_softcap=softcap > 0,
                    num_splits=splits,
                )
            )  # fmt: skip
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, kv_cache.k, kv_cache.v,
            cache_seqlens=step.kv_lens, page_table=step.table, cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query,
            softmax_scale=scale, causal=causal, window_size=window, attention_chunk=chunk, softcap=softcap,
            scheduler_metadata=step.metadata, num_splits=splits, return_softmax_lse=return_lse, sinks=sinks, out=out,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    def call_fp8(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q.clamp(-limit, limit).to(torch.float8_e4m3fn), kv_cache.k, kv_cache.v,
            cache_seqlens=step.kv_lens, page_table=step.table, cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query,
            k_descale=kv_cache.k_scale_t.expand(step.rows, kv_heads),
            v_descale=kv_cache.v_scale_t.expand(step.rows, kv_heads),
            softmax_scale=scale, causal=causal, window_size=window, attention_chunk=chunk, softcap=softcap,
            scheduler_metadata=step.metadata, num_splits=splits, return_softmax_lse=return_lse, sinks=sinks, out=out,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call_fp8 if fp8 else call, prepare_sinks=prepare_sinks)


def _ragged(b: Binding) -> Kernels:
    """Keys in memory: encoders, and materialised MLA."""
    attend = load(SGL_KERNEL, MODULE, "flash_attn_varlen_func")
    step_of, scale, causal, window = attrgetter(b.role), b.scale, b.spec.causal, both_sides(b)
    softcap, splits = b.spec.logit_softcap or 0.0, _splits(b)

    plan = refilled(lambda _: Ragged())

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, k, v, step.cu_query, step.cu_kv, step.max_query, step.max_kv,
            softmax_scale=scale, causal=causal, window_size=window, softcap=softcap, num_splits=splits,
            return_softmax_lse=return_lse, sinks=sinks, out=out,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call, prepare_sinks=prepare_sinks)


def _absorbed(b: Binding) -> Kernels:
    """One key/value head: the cache's rotary part is k, its latent part v, and q's latent part goes as qv."""
    attend = load(SGL_KERNEL, MODULE, "flash_attn_with_kvcache")
    step_of, page_size, scale, splits = attrgetter(b.role), b.page_size or 1, b.scale, _splits(b)
    latent, split = b.v_head_dim, b.mla_query == "split"
    widths = (latent, b.head_dim - latent)

    plan = refilled(lambda capture: Paged(page_size, capture))

    def views(kv_cache: Any) -> tuple[Tensor, Tensor]:
        rows = kv_cache.data[0].unsqueeze(2)
        made = kv_cache.memo["fa3"] = (rows[..., latent:], rows[..., :latent])
        return made

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        rope, latents = kv_cache.memo.get("fa3") or views(kv_cache)
        q_latent, q_rope = q if split else q.split_with_sizes(widths, -1)
        got = attend(
            q_rope, rope, latents, qv=q_latent,
            cache_seqlens=step.kv_lens, page_table=step.table, cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query,
            softmax_scale=scale, causal=True, num_splits=splits, return_softmax_lse=return_lse, out=out,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call)
