"""MLA on the latent cache by sgl-kernel-xpu: one function decodes, one prefills over cached context and new tokens.

Conventions: q in two parts; the page table covers whole tiles of 128 keys; the number of key splits is chosen from that
table, so the workspace is sized for it too, in every plan. Neither returns a LSE.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_core.adapters import Paged, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_intel.backends import SGL_KERNEL_XPU

MODULE = "sgl_kernel.attention"
TILE = 128
"""Keys that the kernels take at a time."""
AUTO_SPLITS = -1


class Step(Paged):
    __slots__ = ("workspace",)

    workspace: Tensor

    def __init__(self, page_size: int, device: torch.device) -> None:
        super().__init__(page_size, None)
        self.workspace = torch.empty(0, dtype=torch.uint8, device=device)


def bind(b: Binding) -> Kernels:
    decodes = b.role == "decode"
    attend, get_size = load(SGL_KERNEL_XPU, MODULE, *_names(decodes))
    step_of, page_size, scale, heads = attrgetter(b.role), b.page_size or 1, b.scale, b.num_heads
    widths, split, device = (b.v_head_dim, b.head_dim - b.v_head_dim), b.mla_query == "split", b.torch_device
    pages_of_a_tile = max(TILE // page_size, 1)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(page_size, device) if out is None else out
        step.fill(batch)
        if short := -step.table.shape[1] % pages_of_a_tile:
            step.table = pad(step.table, (0, short))
        size = get_size(step.table.shape[1] * page_size, step.rows, heads, page_size, AUTO_SPLITS)
        if step.workspace.numel() < size:
            step.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        return step

    def decode(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = step_of(plan)
        latent, rope = q if split else q.split_with_sizes(widths, -1)
        return attend(
            latent, rope, kv_cache.data[0], step.kv_lens, step.table, step.workspace, scale, num_kv_splits=AUTO_SPLITS
        )

    def prefill(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = step_of(plan)
        latent, rope = q if split else q.split_with_sizes(widths, -1)
        return attend(
            latent, rope, kv_cache.data[0], step.cu_query, step.kv_lens, step.max_query, step.table, step.workspace,
            scale, causal=True, num_kv_splits=AUTO_SPLITS,
        )  # fmt: skip

    return Kernels(plan=plan, call=decode if decodes else prefill)


def _names(decodes: bool) -> tuple[str, str]:
    """The function and what sizes its workspace, which was renamed for decode (sgl-kernel-xpu 0742c77)."""
    if not decodes:
        return "flash_mla_prefill", "flash_mla_prefill_get_workspace_size"
    module = load(SGL_KERNEL_XPU, "sgl_kernel", "attention")
    new = "flash_mla_decode_get_workspace_size"
    return "flash_mla_decode", new if hasattr(module, new) else "flash_mla_get_workspace_size"
