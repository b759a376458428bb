"""Groups, batches, backends and devices in flight at once must answer as if each were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_core import Batch
from attn_core.runtime import BoundGroup
from numerics.kernel_cases import Step
from simulators.fake_device import OnDevice, devices
from simulators.harness import Case, Rows, bound, make_step
from simulators.standin import StandIn, installed

Pairs = Sequence[tuple[Rows, Case]]
Make = Callable[[], Sequence[StandIn]]


def check_isolation(pairs: Pairs, make: Make) -> None:
    """Every pair's two steps (of other inputs and pages), alone and then all interleaved; results are bitwise equal.

    Interleaved: all groups are bound first (a backend built later must not change an earlier one), all plans are made
    before anything runs, runs go backwards, then each plan is refilled with the other step of its group and run again.
    """
    alone = [[_run(make_step(_bind(rows, case, make), case, seed)) for seed in (0, 1)] for rows, case in pairs]
    groups = [_bind(rows, case, make) for rows, case in pairs]
    steps = [(make_step(g, case, 0), make_step(g, case, 1)) for g, (_, case) in zip(groups, pairs)]
    for i in reversed(range(len(pairs))):
        for j in (1, 0):
            _same(_run(steps[i][j]), alone[i][j], f"{pairs[i][1].name}, step {j}, with others in flight")
    for a, b in steps:
        plan_a, plan_b = a.plan, b.plan
        a.plan, b.plan = a.group.plan(a.batch, out=plan_b), b.group.plan(b.batch, out=plan_a)
    for i, (pair, case) in enumerate(zip(steps, (c for _, c in pairs))):
        for j, step in enumerate(pair):
            _same(_run(step), alone[i][j], f"{case.name}, step {j}, in a refilled plan")


def check_two_devices(pairs: Pairs, make: Make, kind: str = "cuda") -> None:
    """Every pair on two devices of one kind, interleaved; results are those of the CPU, and nothing waits.

    Tensors that meet on the wrong device raise; reading one on the host (``.item()``, ``.cpu()``) is a failure.
    """
    alone = [_run(make_step(_bind(rows, case, make), case)) for rows, case in pairs]
    with devices(kind) as recorder:
        steps = []
        for place in (f"{kind}:0", f"{kind}:1"):
            for rows, case in pairs:
                steps.append(moved(make_step(_bind(rows, case, make), case), _bind(rows, case, make, place), place))
        recorder.waits.clear()
        for step in steps:
            step.plan = step.group.plan(step.batch)
        results = [_run(step) for step in reversed(steps)]
        assert not recorder.waits, f"waits for the device: {recorder.waits}"
        for step, result, (want, name) in zip(
            reversed(steps), results, reversed([(w, c.name) for w, (_, c) in zip(alone, pairs)] * 2)
        ):
            _same([_numbers(t) for t in result], want, f"{name} on {step.group.torch_device}")


def _bind(rows: Rows, case: Case, make: Make, torch_device: str = "cpu") -> BoundGroup:
    with installed(*make()):
        return bound(rows, case, torch_device)


def _run(step: Step) -> list[Tensor]:
    lse = step.group.options.lse
    got = step.run(return_lse=lse)
    return list(got) if lse else [got]


def _same(got: Sequence[Tensor], want: Sequence[Tensor], where: str) -> None:
    for a, b in zip(got, want):
        assert torch.equal(a, b), f"{where}: differs from the same step alone"


def _numbers(t: Tensor) -> Tensor:
    assert isinstance(t, OnDevice), "the result does not lie on the device"
    return t.numbers


def moved(made: Step, group: BoundGroup, place: str) -> Step:
    """The same step on another device."""

    def put(x: Any) -> Any:
        return tuple(put(y) for y in x) if isinstance(x, tuple) else x.to(place) if isinstance(x, Tensor) else x

    b, cache = made.batch, made.cache
    batch = Batch(
        b.query_lens, b.kv_lens, block_table=put(b.block_table), slot_mapping=put(b.slot_mapping),
        kv_lens_device=None if b.exact else put(b.kv_lens_device), exact=b.exact, decode_width=b.decode_width,
        tree_mask=put(b.tree_mask), attn_type=b.attn_type, device=place,
    )  # fmt: skip
    there = None
    if cache is not None:
        there = group.new_kv_cache(cache.num_pages, k_scale=cache.k_scale_t, v_scale=cache.v_scale_t)
        for t, source in zip(there.data, cache.data):
            t.copy_(source)
    extra = {name: put(t) for name, t in made.extra.items()}
    return replace(
        made, group=group, batch=batch, q=put(made.q), k=put(made.k), v=put(made.v), cache=there, extra=extra
    )


def one(made: str) -> tuple[str, str]:
    """The mutation of an adapter's ``refilled(lambda capture: ...)`` that keeps one step for all plans of a backend."""
    kept = f"kept[0] if kept else kept.append({made}) or kept[0]"
    return f"refilled(lambda capture: {made})", f"refilled(lambda capture, kept=[]: {kept})"
