"""Run by test_ascend_device.py in a process of its own: the adapters on tensors of two devices named ``npu``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulators import ascend_npu
from simulators.device.run import run
from simulators.harness import CROSS, DECODE, MIXED, RAGGED, Case, device, rows_of

CASES = [
    Case(name="mixed", lengths=MIXED),
    Case(name="window and sinks", spec={"sliding_window": 7, "sinks": True}, lengths=DECODE, lse=False),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec={"attn_type": "encoder_only"}, lengths=RAGGED),
    Case(name="latent", spec={"kind": "mla"}, lengths=DECODE, lse=False),
]

if __name__ == "__main__":
    run("npu", rows_of("ascend", device("ascend", "910b"), "ascend"), CASES, ascend_npu.stand_in)
