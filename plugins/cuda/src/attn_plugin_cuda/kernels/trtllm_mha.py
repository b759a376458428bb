"""trtllm-gen's kernels through FlashInfer, on the sm_100 family: planless, paged, with sinks.

Conventions: windows count the keys to the left; the scores' scale is ours to pass, with the cache's k scale in it, and
the output's is the v scale; sinks are float32 (heads,); workspace and counters start as zeros. No LSE is claimed.
"""

from __future__ import annotations

from typing import Any

from attn_core.adapters import left, load
from attn_core.runtime import Binding, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.kernels.scratch import planner

PATH = "trtllm-gen"


def bind(b: Binding) -> Kernels:
    return _decode(b) if b.role == "decode" else _prefill(b)


def _decode(b: Binding) -> Kernels:
    attend = load(FLASHINFER, "flashinfer.decode", "trtllm_batch_decode_with_kv_cache")
    scale, window, layout = b.scale, left(b), b.kv_layout

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.decode
        return attend(
            q, kv_cache.data, step.workspace, step.table, step.kv_lens, step.max_kv,
            bmm1_scale=scale * kv_cache.k_scale, bmm2_scale=kv_cache.v_scale, window_left=window, out=out, sinks=sinks,
            kv_layout=layout, backend=PATH, q_len_per_req=step.max_query, multi_ctas_kv_counter_buffer=step.counters,
        )  # fmt: skip

    return Kernels(plan=planner(b), call=call)


def _prefill(b: Binding) -> Kernels:
    attend = load(FLASHINFER, "flashinfer.prefill", "trtllm_batch_context_with_kv_cache")
    scale, window, layout = b.scale, left(b), b.kv_layout

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.prefill
        return attend(
            q, kv_cache.data, step.workspace, step.table, step.kv_lens, step.max_query, step.max_kv,
            scale * kv_cache.k_scale, kv_cache.v_scale, step.rows, step.cu_query, step.cu_kv, window_left=window,
            out=out, kv_layout=layout, sinks=sinks, causal=True, multi_ctas_kv_counter_buffer=step.counters,
            backend=PATH,
        )  # fmt: skip

    return Kernels(plan=planner(b), call=call)
