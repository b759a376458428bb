"""FlashInfer's all-reduce with residual and RMS norm: the trtllm workspace and one pattern, over a real process group.

Ranks are processes of a gloo group; where the real kernel reads its peers' memory, this gathers.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS
from simulators.standin import StandIn

WHERE = "allreduce_fusion"
VECTOR = 16


def stand_in() -> StandIn:
    return StandIn(
        "flashinfer",
        {
            "flashinfer.comm.create_allreduce_fusion_workspace": Workspace,
            "flashinfer.comm.allreduce_fusion": allreduce_fusion,
        },
    )


class Workspace:
    def __init__(self, a: SimpleNamespace) -> None:
        if a.backend != "trtllm":
            raise NotImplementedError(f"this stand-in knows trtllm workspaces, not {a.backend}")
        if a.world_size > 16:
            raise Refused(f"workspace of {a.world_size} ranks")
        if (dist.get_world_size(a.group), dist.get_rank(a.group)) != (a.world_size, a.rank):
            raise Misuse(f"workspace for rank {a.rank} of {a.world_size}, but the group says otherwise")
        self.group, self.world_size, self.rank = a.group, a.world_size, a.rank
        self.elements, self.hidden, self.wide = a.max_token_num * a.hidden_dim, a.hidden_dim, a.dtype == torch.float32
        self.destroyed = 0
        dist.barrier(self.group)  # handles are exchanged

    def destroy(self) -> None:
        self.destroyed += 1


def allreduce_fusion(a: SimpleNamespace) -> Tensor:
    x, w = a.input, a.workspace
    if w.destroyed:
        raise AttributeError("workspace_tensor")
    if a.pattern != 1:
        raise NotImplementedError(f"this stand-in knows pattern 1, not {a.pattern}")
    if a.residual_in is None or a.residual_out is None or a.norm_out is None or a.rms_gamma is None:
        raise Misuse(f"{WHERE}: the kernel reads and writes through null pointers")
    output = torch.empty_like(x) if a.output is None else a.output
    for name, t in (("input", x), ("output", output), ("residual_in", a.residual_in),
                    ("residual_out", a.residual_out), ("norm_out", a.norm_out)):  # fmt: skip
        if not t.is_contiguous():
            raise Refused(f"{name} must be contiguous")
        if t.shape != x.shape or t.dtype != x.dtype:
            raise Misuse(f"{WHERE}: {name} is {t.dtype} {tuple(t.shape)}, input {x.dtype} {tuple(x.shape)}")
    if a.rms_gamma.shape != x.shape[1:] or a.rms_gamma.dtype != x.dtype or not a.rms_gamma.is_contiguous():
        raise Misuse(f"{WHERE}: the weight is read as {x.dtype} of the row's width")
    if a.norm_out.data_ptr() in (a.residual_out.data_ptr(), a.residual_in.data_ptr()):
        raise Misuse(f"{WHERE}: the norm is written over the residual")
    FACTS.require_dtype("allreduce_dtype", x)
    tokens, hidden = x.shape
    if x.numel() > w.elements or (x.dtype == torch.float32) != w.wide:
        raise Refused(f"{WHERE}: {tokens} x {hidden} {x.dtype} does not fit the workspace")
    once = a.use_oneshot
    if once is None:
        FACTS.require("allreduce_rule_ranks", w.world_size, WHERE)  # a KeyError
        limit = {2: 512, 4: 64, 8: 42}[w.world_size]
        once = tokens * hidden * 2 * w.world_size * x.element_size() / 1024 / 1024 <= limit
    if not once and tokens <= w.world_size:
        raise Refused(f"{WHERE}: sequence length should be larger than tp_size")
    FACTS.require("allreduce_ranks", w.world_size, WHERE)
    if hidden * x.element_size() % VECTOR:
        raise Refused(f"{WHERE}: hidden_dim % VEC_SIZE != 0")
    parts = [torch.empty_like(x) for _ in range(w.world_size)]
    dist.all_gather(parts, x, group=w.group)
    total = torch.stack(parts).to(torch.float32 if a.fp32_acc else x.dtype).sum(0).to(x.dtype)
    a.residual_out.copy_(total + a.residual_in)
    wide = a.residual_out.float()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + a.rms_eps)
    a.norm_out.copy_(norm * (a.rms_gamma.float() + a.weight_bias))
    return a.norm_out
