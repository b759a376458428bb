"""Shared by all tests: one torch thread (two cores, often busy), no network, the same hypothesis profile everywhere."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import HealthCheck, settings

# Where CI runs, the same examples every time: a change is judged by what it does, not by the day's luck.
settings.register_profile(
    "attn",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize="CI" in os.environ,
)
settings.load_profile("attn")
