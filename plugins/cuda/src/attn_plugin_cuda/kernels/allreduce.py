"""FlashInfer's all-reduce with residual and RMS norm (its TensorRT-LLM kernels).

The workspace is memory that ranks map from each other, so they must see each other's devices: one machine, or NVLink
across machines. Its size is fixed when it is made; ranks make and destroy it together.
"""

from __future__ import annotations

from typing import Any

from attn_core.adapters import load
from attn_core.errors import BindError
from attn_core.runtime import AllReduceBinding, AllReduceKernel
from attn_plugin_cuda.backends import FLASHINFER

NORMALISED = 1
"""``AllReduceFusionPattern.kARResidualRMSNorm``."""
VECTOR_BYTES = 16
"""The kernel moves rows in pieces of this size (trtllm_allreduce_fusion.cuh:1709)."""


def bind(b: AllReduceBinding) -> AllReduceKernel:
    reduce = load(FLASHINFER, "flashinfer.comm", "allreduce_fusion")
    create = load(FLASHINFER, "flashinfer.comm", "create_allreduce_fusion_workspace")
    step = VECTOR_BYTES // b.dtype.itemsize
    if b.hidden_size % step:
        raise BindError(f"hidden_size={b.hidden_size} is not accepted; accepted: multiples of {step} in {b.dtype}")
    workspace = create(
        backend="trtllm", world_size=b.world_size, rank=b.rank, max_token_num=b.max_tokens, hidden_dim=b.hidden_size,
        dtype=b.dtype, group=b.process_group,
    )  # fmt: skip

    def call(x: Any, residual: Any, weight: Any, eps: float, out: Any, residual_out: Any) -> None:
        # This pattern leaves ``output`` alone, but without one FlashInfer allocates one. Sums in float32.
        reduce(
            x, workspace, NORMALISED, output=x, residual_in=residual, residual_out=residual_out, norm_out=out,
            rms_gamma=weight, rms_eps=eps, fp32_acc=True,
        )  # fmt: skip

    return AllReduceKernel(call=call, close=workspace.destroy)
