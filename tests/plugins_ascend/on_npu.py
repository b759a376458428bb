"""Run by test_ascend_device.py in a process of its own: the adapters on tensors of two devices named ``npu``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import captured

from simulators import ascend_npu
from simulators.device.run import run
from simulators.harness import CROSS, DECODE, MIXED, RAGGED, VERIFY, Case, Rows, device, rows_of

A2, P310 = (rows_of("ascend", device("ascend", arch), "ascend") for arch in ("910b", "310p"))
HALF = {"dtype": "float16"}
CASES = [
    Case(name="mixed", lengths=MIXED),
    Case(name="window and sinks", spec={"sliding_window": 7, "sinks": True}, lengths=DECODE, lse=False),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec={"attn_type": "encoder_only"}, lengths=RAGGED),
    Case(name="latent", spec={"kind": "mla"}, lengths=DECODE, lse=False),
]
CASES_310P = [
    Case(name="fractal", spec=HALF, lengths=MIXED, lse=False),
    Case(name="fractal, verify", spec=HALF, lengths=VERIFY, options={"verify_width": 3}, batch={"decode_width": 3},
         lse=False),
]  # fmt: skip


def replay(rows: Rows, case: Case) -> None:
    """A graph on each device, filled before any is replayed."""
    npu = ascend_npu.stand_in("npu:0")
    made = [captured.capture(rows, case, npu, place, seed=seed) for seed, place in enumerate(("npu:0", "npu:1"))]
    for lengths in captured.STEPS[:2]:
        batches = [m.fill(lengths) for m in made]
        for m in made:
            m.inputs()
        for m in reversed(made):
            m.replay()
        for m, batch in zip(made, batches):
            assert not m.wrong(batch), m.wrong(batch)
    print(case.name, "replayed", flush=True)


if __name__ == "__main__":
    run("npu", A2, CASES, ascend_npu.stand_in)
    run("npu", P310, CASES_310P, ascend_npu.stand_in)
    for case in (CASES[0], CASES[1], CASES[4]):
        replay(A2, case)
