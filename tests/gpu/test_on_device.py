"""Every backend that can be bound on this machine's device, over one grid, judged in float64; ``make test-gpu``.

On a CPU it runs core's own backends, so that the harness itself is always tested.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import judged as judged_steps
import pytest
from judged import CASES, Refused, judged

from attn_core import BindError, get_platform
from attn_core.bench.case import candidates

PLATFORM = get_platform()
HERE = PLATFORM.name != "cpu"
BACKENDS = sorted({b for role in ("encode", "prefill", "decode") for b in candidates(PLATFORM, role)}) if HERE else [
    "flex_attention", "torch_native"
]  # fmt: skip
NAMES = CASES if HERE else ("mixed", "sinks", "window 33", "encoder", "mla decode, lse")
"""On a CPU: flex_attention is slow there, and the grid is not about it."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_this_device(backend, name, record):
    results = record.setdefault(backend, {})
    try:
        found = judged(PLATFORM, backend, CASES[name])
    except (Refused, BindError) as e:
        results[name] = f"refused: {e}"
        pytest.skip(f"{backend}: {e}")
    results[name] = "; ".join(found) or "right"
    assert not found


@pytest.mark.parametrize("name", ["prefill", "encoder", "mla decode"])
def test_a_wrong_kernel_would_be_noticed(name, monkeypatch):
    """q off by a percent behind the reference's back."""
    original = judged_steps.moved

    def off(made, group):
        step = original(made, group)
        q = tuple(x * 1.01 for x in step.q) if isinstance(step.q, tuple) else step.q * 1.01
        return SimpleNamespace(run=replace(step, q=q).run, want=step.want)

    assert judged(PLATFORM, "torch_native", CASES[name]) == []
    monkeypatch.setattr(judged_steps, "moved", off)
    assert judged(PLATFORM, "torch_native", CASES[name])
