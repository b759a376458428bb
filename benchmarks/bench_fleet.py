"""Cost of deciding for a fleet: kinds cost, ranks hardly do. In CPU time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from harness import Result, cpu_time, ratios, result

from attn_core import ModelSpec, fleet, simulate

MODEL = ModelSpec.from_hf_config(Path(__file__).parents[1] / "tests" / "data" / "models" / "gpt-oss-20b.json")
FIVE = ("cuda:h200", "cuda:sm_80", "cuda:gb10", "rocm:mi300x", "cuda:sm_100")


def deciding() -> Iterator[Result]:
    paper = fleet.read({"ranks": [{"device": d, "count": 2000} for d in FIVE]})
    yield result(
        "10,000 ranks of 5 kinds on paper",
        [t * 1e3 for t in cpu_time(lambda: paper.resolve(MODEL))],
        "ms CPU",
        limit=1000,
    )
    texts = [json.dumps(fleet.describe(MODEL, platform=simulate(d))) for d in FIVE]
    few = cpu_time(lambda: fleet.decide(texts, MODEL))
    many = cpu_time(lambda: fleet.decide(texts * 2000, MODEL))
    yield result("5 ranks of 5 kinds, each described", [t * 1e3 for t in few], "ms CPU")
    yield result("10,000 ranks of 5 kinds, each described", [t * 1e3 for t in many], "ms CPU", limit=1000)
    yield result("10,000 ranks / 5 ranks", ratios(few, many), "x CPU")


ALL = (deciding,)
