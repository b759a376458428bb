"""Run by test_musa_device.py in a process of its own: the adapters on tensors of two devices named ``musa``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from attn_core import Batch
from attn_core.runtime import wrap_kv_cache
from simulators import device, harness, musa_mate
from simulators.harness import DECODE, MIXED, PREFILL, RAGGED, Case, bound, make_step, rows_of
from simulators.standin import installed

CASES = [
    Case(name="mixed", lengths=MIXED),
    Case(name="window and sinks", spec={"sliding_window": 7, "sinks": True}, lengths=DECODE, lse=False),
    Case(name="prefill", lengths=PREFILL),
    Case(name="encoder", spec={"attn_type": "encoder_only"}, lengths=RAGGED),
    Case(name="latent", spec={"kind": "mla"}, lengths=DECODE),
]


def on(where, group, made):
    """The same step of the same layer with all tensors on a device."""
    b = made.batch
    tables = {n: getattr(b, n).to(where) for n in ("block_table", "slot_mapping") if getattr(b, n) is not None}
    batch = Batch(b.query_lens, b.kv_lens, attn_type=b.attn_type, device=where, **tables)
    cache = made.cache
    if cache is not None:
        cache = wrap_kv_cache(*(t.to(where) for t in cache.data), layout=cache.layout, page_size=cache.page_size)
    q = tuple(t.to(where) for t in made.q) if isinstance(made.q, tuple) else made.q.to(where)
    k, v = (None if t is None else t.to(where) for t in (made.k, made.v))
    extra = {n: t.to(where) for n, t in made.extra.items()}
    return replace(made, group=group, batch=batch, plan=group.plan(batch), q=q, k=k, v=v, cache=cache, extra=extra)


def main() -> None:
    torch.set_num_threads(1)
    musa = device.install("musa")
    bind = harness.bind_decision
    rows = rows_of("musa", harness.device("musa", "mp31"), "fa3")
    for case in CASES:
        with installed(musa_mate.stand_in()):
            groups = {}
            for where in ("cpu", "musa:0", "musa:1"):
                harness.bind_decision = lambda decision, _, where=where: bind(decision, where)
                groups[where] = bound(rows, case)
        expected = make_step(groups["cpu"], case)
        steps = {where: on(where, groups[where], expected) for where in ("musa:0", "musa:1")}  # both planned, then run
        assert musa.current_device() == 0
        want = expected.run(return_lse=case.lse)
        for where, step in steps.items():
            got = step.run(return_lse=case.lse)
            for a, b in zip(got if case.lse else (got,), want if case.lse else (want,)):
                assert a.device == torch.device(where), (case.name, where, a.device)
                assert torch.equal(a.cpu(), b), (case.name, where, (a.cpu() - b).abs().max())
        assert musa.current_device() == 0, "an adapter changed the current device"
        print(case.name, "ok", flush=True)


if __name__ == "__main__":
    main()
