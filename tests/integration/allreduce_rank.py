"""One rank of a real gloo group that binds ``allreduce_fusion``: ``allreduce_rank.py RANK SIZE PORT BACKEND``.

``BACKEND``: ``unfused`` as decided on this CPU, or ``flashinfer`` bound as decided for SM90, its package a stand-in.
Prints one line of JSON: errors in units of the dtype's epsilon against float64, and what was refused.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from attn_core import AttentionSpec, AttnCoreError, simulate
from attn_core.runtime.allreduce import AllReduceFusion, bind_allreduce
from simulators.cuda_allreduce import stand_in
from simulators.standin import installed

HIDDEN, TOKENS, EPS = 256, 24, 1e-5


def bound(backend: str, rank: int, size: int, dtype: str, **sizes: Any) -> AllReduceFusion:
    device = "cpu:avx2" if backend == "unfused" else "cuda:sm_90"
    model = AttentionSpec(num_heads=24, num_kv_heads=12, head_dim=128, dtype=dtype)
    decision = simulate(device).resolve(model, tensor_parallel=size)
    assert decision.backend("allreduce_fusion") == backend, decision.explain()
    sizes = {"hidden_size": HIDDEN, "max_tokens": TOKENS, "process_group": None, **sizes}
    return bind_allreduce(decision, torch.device("cpu"), rank=rank, dtype=getattr(torch, dtype), **sizes)


def step(fused: AllReduceFusion, rank: int, size: int, tokens: int, inplace: bool) -> float:
    """Largest error of both results, relative to the dtype's epsilon and the largest number."""
    dtype = fused.binding.dtype
    g = torch.Generator().manual_seed(tokens)
    parts = torch.randn(size, tokens, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    residual = torch.randn(tokens, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.rand(HIDDEN, generator=g, dtype=torch.float64).add(0.5).to(dtype)
    total = parts.double().sum(0) + residual.double()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
    mine = parts[rank].clone()
    out, after = fused(
        mine, residual, weight, eps=EPS, out=mine if inplace else None, residual_out=residual if inplace else None
    )
    if inplace:
        assert out is mine
        assert after is residual
    unit = torch.finfo(dtype).eps
    return max(float((got.double() - want).abs().max() / want.abs().max() / unit)
               for got, want in ((out, normed), (after, total)))  # fmt: skip


def refused(work: Any) -> str:
    try:
        work()
    except (AttnCoreError, ValueError) as e:
        return str(e)
    return "nothing"


def main() -> None:
    rank, size, port, backend = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    fake = stand_in()
    with ExitStack() as stack:
        if backend == "flashinfer":
            stack.enter_context(installed(fake))
        errors, texts = [], []
        for dtype in ("bfloat16", "float16"):
            with bound(backend, rank, size, dtype) as fused:
                errors += [step(fused, rank, size, t, i) for t, i in ((1, False), (TOKENS, True), (7, False))]
        x, w = torch.zeros(4, HIDDEN, dtype=fused.binding.dtype), torch.ones(HIDDEN, dtype=fused.binding.dtype)
        texts.append(refused(lambda: fused(x, x.clone(), w, eps=EPS)))
        texts.append(refused(lambda: bound(backend, rank, size, "float16", hidden_size=HIDDEN + 4).close()))
        texts.append(refused(lambda: bound(backend, 1 - rank if rank < 2 else 0, size, "float16")))
        made = [a.workspace for n, a in fake.calls if n.endswith(".allreduce_fusion")]
    print(json.dumps({"errors": errors, "texts": texts, "open": sum(not w.destroyed for w in made)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
