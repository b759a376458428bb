"""Writes new keys into pages of 128 by ``npu_scatter_pa_kv_cache``, layout NHD.

Its cache mode defaults to the fractal format, so ``Norm`` is always given. What slot -1 does is not stated, and slots
must differ: keys that are not written go as zeros to slot 0, which lies on the null page and holds zeros already.
Reading back is core's.

Source: op-plugin npu_scatter_pa_kv_cache.md (517f2e7); vllm-ascend 182b75e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import load
from attn_core.backends.torch_native import kv_write as core
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_ascend.backends import TORCH_NPU


class Slots:
    """Where one step's keys go, on the device."""

    __slots__ = ("slots", "written")

    slots: Tensor
    """int32 ``(keys,)``."""
    written: Tensor
    """bool ``(keys, 1, 1)``."""


def bind(b: Binding) -> Kernels:
    scatter = load(TORCH_NPU, "torch_npu", "npu_scatter_pa_kv_cache")

    def plan(batch: Batch, *, capture: Capture | None = None, out: Slots | None = None) -> Slots | None:
        if batch.slot_mapping is None:
            return None
        step = Slots() if out is None else out
        step.slots = batch.slot_mapping.clamp(min=0).to(torch.int32)
        step.written = (batch.slot_mapping >= 0).view(-1, 1, 1)
        return step

    def write(k: Tensor, v: Tensor, kv_cache: Any, plan: Any) -> None:
        step: Slots = plan.write
        n = step.slots.shape[0]
        rows = (t[:n].where(step.written, 0).contiguous() for t in (k, v))
        scatter(*rows, *kv_cache.data, step.slots, cache_mode="Norm")

    return Kernels(plan=plan, call=write, gather=core.bind(b).gather)
