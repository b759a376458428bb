"""``unfused``: the sum over ranks, then residual and normalisation in plain torch, as an engine without fusion does."""

from __future__ import annotations

import torch

from attn_core.runtime.binding import AllReduceBinding, AllReduceKernel


def bind(b: AllReduceBinding) -> AllReduceKernel:
    group, alone = b.process_group, b.world_size == 1

    def call(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:  # fmt: skip
        if not alone:
            torch.distributed.all_reduce(x, group=group)
        # In float32, because the sum of squares of a long row does not fit 16 bits; the residual is rounded first: the
        # next layer reads it as it is stored.
        torch.add(x, residual, out=residual_out)
        wide = residual_out.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        out.copy_(wide * scale * weight.float())

    return AllReduceKernel(call=call, close=lambda: None)
