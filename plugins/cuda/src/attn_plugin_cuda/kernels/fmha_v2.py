"""TensorRT-LLM's FMHA v2 through FlashInfer, for encoders on Hopper and SM12x: no plan, lengths from the device.

Only keys in memory: over pages the kernel finds values relative to the keys' address, which a cache of two tensors does
not promise. Hopper's kernel takes q, k and v apart, SM12x's wants k and v in one tensor.

Conventions: strides follow from shapes, so everything is made contiguous; the mask is ``padding``, causal unless named;
the scores' scale is ours to pass; the workspace starts as zeros. No LSE: it would be (maximum, sum) pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Ragged, load, refilled
from attn_core.runtime import Batch, Binding, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.memory import workspace


def bind(b: Binding) -> Kernels:
    attend = load(FLASHINFER, "flashinfer.prefill", "trtllm_fmha_v2_prefill")
    layout, inputs = ("SEPARATE_Q_K_V", _apart) if "wgmma" in b.device.isa else ("CONTIGUOUS_Q_KV", _stacked)
    scale = b.scale

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.encode
        return attend(
            inputs(q, k, v), layout, step.workspace, step.kv_lens, step.max_query, step.max_kv, scale, 1.0, step.rows,
            step.cu_query, step.cu_kv, mask_mode="padding",
        )  # fmt: skip

    return Kernels(plan=refilled(lambda _: Rows(b.torch_device)), call=call)


def _apart(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q.contiguous(), k.contiguous(), v.contiguous()


def _stacked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q.contiguous(), torch.stack((k, v), 1)


class Rows(Ragged):
    """Keys in memory, with the memory the kernel works in."""

    __slots__ = ("kv_lens", "rows", "workspace")

    rows: int
    kv_lens: Tensor

    def __init__(self, device: torch.device) -> None:
        self.workspace = workspace(device).zero_()

    def fill(self, batch: Batch) -> None:
        super().fill(batch)
        self.rows, self.kv_lens = batch.num_seqs, batch.kv_lens_device
