"""FlashInfer's all-reduce stand-in: its quirks, on a group whose other ranks are not there."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.distributed as dist

from simulators.contract import Misuse, Refused
from simulators.cuda_allreduce import stand_in
from simulators.standin import installed

TOKENS, HIDDEN = 4, 64


@pytest.fixture
def group():
    """Starts a group of the given size; sums over it mean nothing."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def start(size):
        dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=size)

    with installed(stand_in()):
        yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def reduce(size, **changed):
    comm, x = importlib.import_module("flashinfer.comm"), torch.zeros(TOKENS, HIDDEN, dtype=torch.float16)
    workspace = comm.create_allreduce_fusion_workspace(
        backend="trtllm", world_size=size, rank=0, max_token_num=TOKENS, hidden_dim=HIDDEN, dtype=x.dtype
    )
    given = {
        "input": x, "workspace": workspace, "pattern": 1, "residual_in": x.clone(), "residual_out": x.clone(),
        "norm_out": x.clone(), "rms_gamma": torch.ones(HIDDEN, dtype=x.dtype), **changed,
    }  # fmt: skip
    return comm.allreduce_fusion(**given)


@pytest.mark.parametrize("size", [3, 6, 16])
def test_quirk_allreduce_ranks_late(group, size):
    group(size)
    with pytest.raises(Refused, match=f"={size} is not accepted"):
        reduce(size)
    if size == 16:
        reduce(size, use_oneshot=True)
    else:
        with pytest.raises(Refused, match="allreduce_ranks"):
            reduce(size, use_oneshot=True)


def test_quirk_allreduce_leaves_output(group):
    group(2)
    output = torch.full((TOKENS, HIDDEN), 7.0, dtype=torch.float16)
    reduce(2, output=output)
    assert (output == 7).all()


def test_quirk_allreduce_pointers_unchecked(group):
    group(2)
    for name in ("residual_in", "residual_out", "norm_out"):
        for wrong in (torch.zeros(TOKENS, HIDDEN), torch.zeros(TOKENS, HIDDEN + 8, dtype=torch.float16)):
            with pytest.raises(Misuse, match=name):
                reduce(2, **{name: wrong})
    with pytest.raises(Misuse, match="weight"):
        reduce(2, rms_gamma=torch.ones(HIDDEN))
    with pytest.raises(Misuse, match="null"):
        reduce(2, rms_gamma=None)


def test_more_than_the_workspace_holds(group):
    group(2)
    x = torch.zeros(TOKENS + 1, HIDDEN, dtype=torch.float16)
    with pytest.raises(Refused, match="does not fit"):
        reduce(2, input=x, residual_in=x.clone(), residual_out=x.clone(), norm_out=x.clone())
    x = torch.zeros(TOKENS, HIDDEN + 4, dtype=torch.float16)[:, :HIDDEN]
    with pytest.raises(Refused, match="contiguous"):
        reduce(2, input=x)
