"""AITER's one Triton kernel for prefill and decode: causal, no LSE, writes ``out``.

Conventions: the window goes as (left, 0) without the token itself, the kernel counts ``1 + left`` keys; sinks are
(heads,); descales are (rows, kv heads) of which one number is read, so scales per head are refused.

Source: AITER e404860 aiter/ops/triton/attention/unified_attention.py; vLLM 0.33.0 rocm_aiter_unified_attn.py.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from attn_core.adapters import Paged, both_sides, load, refilled
from attn_core.errors import BadInputError
from attn_core.runtime import Binding, Kernels
from attn_plugin_rocm.backends import AITER

MODULE = "aiter.ops.triton.attention.unified_attention"


def bind(b: Binding) -> Kernels:
    attend = load(AITER, MODULE, "unified_attention")
    step_of, page_size, kv_heads = attrgetter(b.role), b.page_size or 1, b.num_kv_heads
    scale, window, softcap, width = b.scale, both_sides(b), b.spec.logit_softcap or 0.0, b.v_head_dim
    slopes = b.alibi_slopes and torch.tensor(b.alibi_slopes, dtype=torch.float32, device=b.torch_device)
    quantised = b.kv_dtype != b.dtype

    plan = refilled(lambda capture: Paged(page_size, capture))

    def descales(kv_cache: Any, rows: int) -> tuple[Any, Any]:
        if kv_cache.k_scale_t.dim() or kv_cache.v_scale_t.dim():
            raise BadInputError("aiter's unified kernel reads one scale each for k and v; this cache has some per head")
        return kv_cache.k_scale_t.expand(rows, kv_heads), kv_cache.v_scale_t.expand(rows, kv_heads)

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], width)
        k_descale, v_descale = descales(kv_cache, step.rows) if quantised else (None, None)
        attend(
            q, kv_cache.k, kv_cache.v, out, step.cu_query, step.max_query, step.kv_lens, step.max_kv, scale, True,
            window, step.table, softcap, None, k_descale, v_descale, alibi_slopes=slopes, sinks=sinks,
        )  # fmt: skip
        return out

    return Kernels(plan=plan, call=call)
