"""FlashInfer's template kernels with attention sinks: the paged wrapper, built with the variant that applies them.

FlashInfer's own ``BatchAttentionWithAttentionSinkWrapper`` is that wrapper too, but names its binary by dtype, window
and kernel only: two widths in one process would share one. So the variant is handed to the wrapper here, under a name
that holds all its binary depends on.

The variant's ``run`` takes the sinks, float32 (heads,), and the scores' scale behind the cache. It knows no soft cap
and no custom mask, whatever is planned.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from attn_core.adapters import left, load
from attn_core.runtime import Binding, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.kernels.flashinfer import paged


def bind(b: Binding) -> Kernels:
    return _bind(b, "fa2")


def bind_fa3(b: Binding) -> Kernels:
    return _bind(b, "fa3")


def _bind(b: Binding, path: str) -> Kernels:
    source = load(FLASHINFER, "flashinfer.jit.attention.variants", "attention_sink_decl")[path]
    in_window = left(b) >= 0
    dtype = str(b.dtype).removeprefix("torch.")
    name = f"attn_core_sinks_{path}_{dtype}_{b.head_dim}_{b.v_head_dim}_{'window' if in_window else 'full'}"
    kernels = paged(
        b, path,
        jit_args=[
            name, b.dtype, b.dtype, b.dtype, torch.int32, b.head_dim, b.v_head_dim, ["sink"], ["float"], ["sm_scale"],
            ["double"], "AttentionSink", source,
        ],
        jit_kwargs={"use_sliding_window": in_window},
    )  # fmt: skip
    step_of, scale = attrgetter(b.role), b.scale

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        return step_of(plan).wrapper.run(q, kv_cache.data, sinks, scale, out=out)

    return replace(kernels, call=call)
