"""Writes new keys into pages: layout NHD by ``npu_scatter_pa_kv_cache``, ASCEND_NZ by ``_npu_reshape_and_cache``.

The first one's cache mode defaults to the fractal format, so ``Norm`` is always given; its page lists A2 and A3 only,
so 310P has ATB's. That one looks at the format that a cache's memory is tagged with, and takes anything but two NZ
caches for plain ones. What slot -1 does is not stated, and slots must differ: keys that are not written go as zeros to
slot 0, which lies on the null page and holds zeros already.

Sources: op-plugin npu_scatter_pa_kv_cache.md, ops/atb/ReshapeAndCachAtb.cpp (517f2e7); vllm-ascend 182b75e
device_op.py, _310p/model_runner_310p.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import load
from attn_core.backends.torch_native import kv_write as core
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_ascend.backends import TORCH_NPU
from attn_plugin_ascend.kernels import nz
from attn_plugin_ascend.kernels.nnal import atb


class Slots:
    """Where one step's keys go, on the device; at fixed addresses where a graph was captured."""

    __slots__ = ("_captured", "_kept", "slots", "written")

    slots: Tensor
    """int32 ``(keys,)``."""
    written: Tensor
    """bool ``(keys, 1, 1)``."""

    def __init__(self, capture: Capture | None) -> None:
        self._captured, self._kept = capture is not None, False

    def fill(self, batch: Batch) -> None:
        given: Any = batch.slot_mapping
        slots, written = given.clamp(min=0).to(torch.int32), (given >= 0).view(-1, 1, 1)
        if self._kept:
            self.slots.copy_(slots)
            self.written.copy_(written)
        else:
            self.slots, self.written, self._kept = slots, written, self._captured


def plan(batch: Batch, *, capture: Capture | None = None, out: Slots | None = None) -> Slots | None:
    if batch.slot_mapping is None:
        return None
    step = Slots(capture) if out is None else out
    step.fill(batch)
    return step


def rows(k: Tensor, v: Tensor, step: Slots) -> tuple[Tensor, Tensor]:
    """The step's keys ``(keys, heads, width)``, zeros where nothing is to be written."""
    n = step.slots.shape[0]
    k, v = (t[:n].where(step.written, 0).contiguous() for t in (k, v))
    return k, v


def bind(b: Binding) -> Kernels:
    """NHD. Reading back is core's."""
    scatter = load(TORCH_NPU, "torch_npu", "npu_scatter_pa_kv_cache")

    def write(k: Tensor, v: Tensor, kv_cache: Any, plan: Any) -> None:
        scatter(*rows(k, v, plan.write), *kv_cache.data, plan.write.slots, cache_mode="Norm")

    return Kernels(plan=plan, call=write, gather=core.bind(b).gather)


def bind_nz(b: Binding) -> Kernels:
    """ASCEND_NZ, see ``nz``."""
    put = atb("_npu_reshape_and_cache")
    make, pages = load(TORCH_NPU, "torch_npu", "empty_with_format"), nz.pages_of(b)
    heads, page_size, shapes = b.num_kv_heads, b.page_size or 0, nz.shapes(b)

    def write(k: Tensor, v: Tensor, kv_cache: Any, plan: Any) -> None:
        put(*rows(k, v, plan.write), *pages(kv_cache), plan.write.slots)

    def gather(kv_cache: Any, plan: Any, chunk: Any) -> tuple[Tensor, Tensor]:
        """The chunk's keys ``(keys, heads, width)``, k and v."""
        page, place = chunk.slots // page_size, chunk.slots % page_size
        k, v = (t[page, :, place].reshape(page.shape[0], heads, -1) for t in pages(kv_cache))
        return k, v

    def allocate(num_pages: int) -> tuple[Tensor, ...]:
        more = {"dtype": b.kv_dtype, "device": b.torch_device, "acl_format": nz.FRACTAL_NZ}
        return tuple(make([num_pages, *shape], **more) for shape in shapes)

    return Kernels(plan=plan, call=write, gather=gather, allocate=allocate)
