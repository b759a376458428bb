"""Run by test_musa_device.py in a process of its own: the adapters on tensors of two devices named ``musa``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulators import musa_mate
from simulators.device.run import run
from simulators.harness import DECODE, MIXED, PREFILL, RAGGED, Case, device, rows_of

CASES = [
    Case(name="mixed", lengths=MIXED),
    Case(name="window and sinks", spec={"sliding_window": 7, "sinks": True}, lengths=DECODE, lse=False),
    Case(name="prefill", lengths=PREFILL),
    Case(name="encoder", spec={"attn_type": "encoder_only"}, lengths=RAGGED),
    Case(name="latent", spec={"kind": "mla"}, lengths=DECODE, lse=False),
]

if __name__ == "__main__":
    run("musa", rows_of("musa", device("musa", "mp31"), "fa3"), CASES, musa_mate.stand_in)
