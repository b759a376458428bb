"""Adapters on two devices of one name, against the same steps on the CPU. For a process of its own per vendor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from attn_core.runtime import BoundGroup
from numerics.kernel_cases import Step
from simulators import device, isolation
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
    """The same step of the same layer with all tensors on the group's device, planned there."""
    there = isolation.moved(made, group, str(group.torch_device))
    return replace(there, plan=group.plan(there.batch))
