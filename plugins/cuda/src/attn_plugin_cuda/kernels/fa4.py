"""FlashAttention-4 (``flash_attn.cute``), CuTe-DSL kernels of the sm_100 family.

One function serves pages and ragged keys, decode and prefill. Conventions: windows are (left, right) without the token
itself; causality is aligned to the bottom right; over pages key lengths go as ``seqused_k``; sinks are
float32 (heads,); the result is always a pair, LSE natural log (heads, tokens).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from attn_core.adapters import Paged, Ragged, both_sides, load, refilled
from attn_core.runtime import Binding, Kernels
from attn_plugin_cuda.backends_flash import FLASH_ATTN_4

MODULE = "flash_attn.cute"


def bind(b: Binding) -> Kernels:
    return _ragged(b) if b.kv_layout is None else _paged(b)


def _paged(b: Binding) -> Kernels:
    attend = load(FLASH_ATTN_4, MODULE, "flash_attn_varlen_func")
    step_of, page_size, scale, causal = attrgetter(b.role), b.page_size or 1, b.scale, b.spec.causal
    window, softcap = both_sides(b), b.spec.logit_softcap or 0.0

    plan = refilled(lambda capture: Paged(page_size, capture))

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        o, lse = attend(
            q, kv_cache.k, kv_cache.v,
            cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query, max_seqlen_k=step.max_kv, seqused_k=step.kv_lens,
            page_table=step.table, softmax_scale=scale, causal=causal, window_size=window, learnable_sink=sinks,
            softcap=softcap, return_lse=return_lse,
        )  # fmt: skip
        return (o, lse.T) if return_lse else o

    return Kernels(plan=plan, call=call)


def _ragged(b: Binding) -> Kernels:
    """Encoders: keys in memory."""
    attend = load(FLASH_ATTN_4, MODULE, "flash_attn_varlen_func")
    scale, window, softcap = b.scale, both_sides(b), b.spec.logit_softcap or 0.0

    plan = refilled(lambda _: Ragged())

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.encode
        o, lse = attend(
            q, k, v, cu_seqlens_q=step.cu_query, cu_seqlens_k=step.cu_kv, max_seqlen_q=step.max_query,
            max_seqlen_k=step.max_kv, softmax_scale=scale, causal=False, window_size=window, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
        return (o, lse.T) if return_lse else o

    return Kernels(plan=plan, call=call)
