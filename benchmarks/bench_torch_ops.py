"""What ``torch.ops.attn_core`` costs per call above the bound function, over a kernel with an empty body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bench_overhead import Empty
from harness import Result, cpu_time, result

from attn_core import Batch
from attn_core.integrations.torch_ops import Slot
from attn_core.platform import Platform
from attn_core.plugins import load_plugins


def operators() -> Iterator[Result]:
    plugins = load_plugins(extra=[("bench", Empty)], discovery=False)
    platform = Platform(plugins.platforms()["cpu"], plugins.probe(), plugins)
    attn = platform.attention_backend(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16", backend="empty")
    table = torch.tensor([[1], [2]], dtype=torch.int32)
    (group,) = attn.groups.values()
    plan = group.plan(Batch([1, 1], [5, 7], block_table=table, slot_mapping=torch.tensor([20, 38])))
    slot = Slot(group)
    slot.set(plan)
    q = out = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    k = v = torch.zeros(2, 2, 64, dtype=torch.bfloat16)
    cache = group.new_kv_cache(8)
    data, handle, ops = list(cache.data), slot.handle, torch.ops.attn_core
    calls: dict[str, Any] = {
        "forward_out": lambda: ops.forward_out.default(q, k, v, data, handle, out=out),
        "forward, which makes its output": lambda: ops.forward.default(q, k, v, data, handle),
    }
    with torch.inference_mode():
        bound = cpu_time(lambda: group.forward(q, k, v, cache, plan, out=out))
        for name, call in calls.items():
            added = [(b - a) * 1e6 for a, b in zip(bound, cpu_time(call))]
            yield result(f"attn_core::{name}, over the bound forward", added, "us CPU", limit=25)
        noop = cpu_time(lambda: torch.ops.attn_core_bench.noop.default(q, k, v, data, handle, out=out))
        yield result("an operator of that schema that does nothing", [t * 1e6 for t in noop], "us CPU")


_library = torch.library.Library("attn_core_bench", "DEF")
_library.define("noop(Tensor q, Tensor k, Tensor v, Tensor(a!)[] kv_cache, str slot, *, Tensor(b!) out) -> ()")
_library.impl("noop", lambda q, k, v, kv_cache, slot, *, out: None, "CompositeExplicitAutograd")

ALL = (operators,)
