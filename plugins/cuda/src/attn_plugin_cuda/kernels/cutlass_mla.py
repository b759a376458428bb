"""CUTLASS MLA decode on the sm_100 family, vLLM's operator: 128 heads (the core pads), one query a row, pages of 128.

Conventions: q comes in two parts; out and lse are filled in place, lse natural log (rows, heads); fp8 inputs give a
bfloat16 out, whose scale is left to us.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Paged, load
from attn_core.errors import MissingKernelError
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends_mla import VLLM
from attn_plugin_cuda.kernels.scratch import MOST_PROCESSORS

AUTO_SPLITS = -1


class Step(Paged):
    __slots__ = ("workspace",)

    workspace: Tensor

    def __init__(self, page_size: int, capture: Capture | None, device: torch.device) -> None:
        super().__init__(page_size, capture)
        self.workspace = torch.empty(0, dtype=torch.uint8, device=device)


def bind(b: Binding) -> Kernels:
    load(VLLM, "vllm._custom_ops", "sm100_cutlass_mla_decode")  # registers the operators
    try:
        attend, get_size = torch.ops._C.sm100_cutlass_mla_decode, torch.ops._C.sm100_cutlass_mla_get_workspace_size
    except AttributeError as e:
        raise MissingKernelError(f"this build of vllm has no CUTLASS MLA ({e}); {VLLM.install}") from e
    page_size, scale, latent, split = b.page_size or 1, b.scale, b.v_head_dim, b.mla_query == "split"
    device, fp8, limit = b.torch_device, b.kv_dtype != b.dtype, torch.finfo(torch.float8_e4m3fn).max
    widths = (latent, b.head_dim - latent)
    shape, dtype, nothing = (b.num_heads, latent), b.dtype, torch.empty(0, device=b.torch_device)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(page_size, capture, device) if out is None else out
        step.fill(batch)
        size = get_size(step.table.shape[1] * page_size, step.rows, MOST_PROCESSORS, AUTO_SPLITS)
        if step.workspace.numel() < size:
            step.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, stored = plan.decode, kv_cache.k_scale
        q_latent, q_rope = q if split else q.split_with_sizes(widths, -1)
        if fp8:
            q_latent, q_rope = (t.clamp(-limit, limit).to(torch.float8_e4m3fn) for t in (q_latent, q_rope))
        if out is None:
            out = q_latent.new_empty((step.rows, *shape), dtype=dtype)
        lse = out.new_empty((step.rows, shape[0]), dtype=torch.float32) if return_lse else nothing
        attend(
            out, lse, q_latent, q_rope, kv_cache.data[0], step.kv_lens, step.table, step.workspace, scale * stored,
            AUTO_SPLITS,
        )  # fmt: skip
        if fp8:
            out.mul_(stored)
        return (out, lse) if return_lse else out

    return Kernels(plan=plan, call=call)
