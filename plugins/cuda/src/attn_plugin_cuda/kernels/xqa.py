"""FlashInfer's XQA decode on SM12x: no plan, lengths from the device, no LSE.

Conventions: windows count the keys to the left; the scores' scale is ours to pass, with the cache's k scale in it; the
first bytes of the workspace are semaphores and start as zeros; sinks, for rows that claim them, are float32 (heads,);
q is read as if it were contiguous (csrc/xqa/xqa_wrapper.cu), though an engine's is often a part of a fused projection.
"""

from __future__ import annotations

from typing import Any

from attn_core.adapters import left, load
from attn_core.runtime import Binding, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.kernels.scratch import planner


def bind(b: Binding) -> Kernels:
    attend = load(FLASHINFER, "flashinfer.decode", "xqa_batch_decode_with_kv_cache")
    scale, window, layout = b.scale, left(b), b.kv_layout

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.decode
        return attend(
            q.contiguous(), kv_cache.data, step.workspace, step.table, step.kv_lens, step.max_kv,
            bmm1_scale=scale * kv_cache.k_scale, bmm2_scale=kv_cache.v_scale, window_left=window, out=out,
            sinks=sinks, kv_layout=layout,
        )  # fmt: skip

    return Kernels(plan=planner(b), call=call)
