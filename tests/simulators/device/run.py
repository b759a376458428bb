"""Adapters on two devices of one name, against the same steps on the CPU. For a process of its own per vendor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from attn_core import Batch
from attn_core.runtime import BoundGroup, wrap_kv_cache
from numerics.kernel_cases import Step
from simulators import device
from simulators.harness import Case, Rows, bound, make_step
from simulators.standin import StandIn, installed


def run(name: str, rows: Rows, cases: Iterable[Case], stand_in: Callable[[], StandIn]) -> None:
    """Plan on both devices, then run on both; results must be the CPU's bit for bit, and lie where their inputs lie.

    The current device is the first one throughout. Prints a line per case; raises AssertionError.
    """
    torch.set_num_threads(1)
    module = device.install(name)
    for case in cases:
        with installed(stand_in()):
            groups = {where: bound(rows, case, where) for where in ("cpu", f"{name}:0", f"{name}:1")}
        expected = make_step(groups["cpu"], case)
        steps = {where: moved(expected, groups[where]) for where in groups if where != "cpu"}
        assert module.current_device() == 0, "planning changed the current device"
        want = expected.run(return_lse=case.lse)
        for where, step in steps.items():
            got = step.run(return_lse=case.lse)
            for a, b in zip(got if case.lse else (got,), want if case.lse else (want,)):
                assert a.device == torch.device(where), (case.name, where, a.device)
                assert torch.equal(a.cpu(), b), (case.name, where, (a.cpu() - b).abs().max())
        assert module.current_device() == 0, "a call changed the current device"
        print(case.name, "ok", flush=True)


def moved(made: Step, group: BoundGroup) -> Step:
    """The same step with all tensors on the group's device, planned there."""
    where = group.torch_device

    def put(x: Any) -> Any:
        return tuple(map(put, x)) if isinstance(x, tuple) else x if x is None else x.to(where)

    b, cache = made.batch, made.cache
    tensors = {n: put(getattr(b, n)) for n in ("block_table", "slot_mapping", "tree_mask") if getattr(b, n) is not None}
    batch = Batch(b.query_lens, b.kv_lens, attn_type=b.attn_type, device=where, decode_width=b.decode_width, **tensors)
    if cache is not None:
        data = tuple(torch.clone(put(t)) for t in cache.data)
        cache = wrap_kv_cache(*data, layout=cache.layout, page_size=cache.page_size)
    q, k, v = (put(x) for x in (made.q, made.k, made.v))
    extra = {n: put(t) for n, t in made.extra.items()}
    return replace(made, group=group, batch=batch, plan=group.plan(batch), q=q, k=k, v=v, cache=cache, extra=extra)
