"""What the contract costs per call, over a kernel with an empty body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import Result, cpu_time, result

from attn_core import ANY, BackendSpec, Batch, Kernels, hookimpl
from attn_core.platform import Platform
from attn_core.plugins import load_plugins


class Empty:
    """A plugin whose decode does nothing: what is left is the house's own cost."""

    @staticmethod
    @hookimpl
    def attn_backends(device: Any) -> Any:
        accepts = {"dtype": ANY, "head_dim": ANY, "native_out": True, "appends": True, "graph": "none"}
        for role in ("prefill", "decode"):
            yield BackendSpec(
                backend="empty",
                role=role,
                platform=device.platform,
                tier="BEST",
                accepts=accepts,
                bind="bench_overhead:bind",
            )


def bind(binding: Any) -> Kernels:
    def call(q, k, v, kv_cache, plan, *, sinks=None, indices=None, bias=None, out=None, return_lse=False):  # type: ignore[no-untyped-def]
        return out

    return Kernels(plan=lambda batch, *, capture=None, out=None: out or object(), call=call)


def calling() -> Iterator[Result]:
    plugins = load_plugins(extra=[("bench", Empty)], discovery=False)
    devices = plugins.probe()
    platform = Platform(plugins.platforms()["cpu"], devices, plugins)
    attn = platform.attention_backend(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16", backend="empty")
    table = torch.tensor([[1], [2]], dtype=torch.int32)
    batch = Batch([1, 1], [5, 7], block_table=table, slot_mapping=torch.tensor([20, 38]))
    plan = attn.plan(batch)
    q = out = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    k = v = torch.zeros(2, 2, 64, dtype=torch.bfloat16)
    cache = attn.new_kv_cache(8)
    direct = cpu_time(lambda: attn.decode(q, k, v, cache, plan, out=out))
    forward = cpu_time(lambda: attn.forward(q, k, v, cache, plan, out=out))
    kernel = attn.groups["full"]._bound["decode"].kernels.call
    bare = cpu_time(lambda: kernel(q, k, v, cache, plan, out=out))
    added = [(b - a) * 1e6 for a, b in zip(direct, forward)]
    yield result("forward on a one-kind batch, over the kernel itself", added, "us CPU", limit=1)
    looked = [(b - a) * 1e6 for a, b in zip(bare, direct)]
    yield result("looking for gaps in out=, over the kernel itself", looked, "us CPU", limit=1)
    refill = cpu_time(lambda: attn.plan(batch, out=plan))
    yield result("plan(out=) of 2 sequences, kernels' own part empty", [t * 1e6 for t in refill], "us CPU")


ALL = (calling,)
