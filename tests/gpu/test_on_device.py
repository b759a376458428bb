"""Every backend that can be bound on this machine's device, over one grid, judged in float64; ``make test-gpu``.

On a CPU it runs core's own backends, so that the harness itself is always tested.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import judged as judged_steps
import pytest
from judged import CASES, GRAPHS, Refused, asked, judged, replayed

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
def test_on_this_device(backend, name, record_property):
    note(record_property, backend, name, CASES[name], judged)


@pytest.mark.skipif(PLATFORM.name not in ("cuda", "rocm"), reason="graphs of decode steps, captured by torch.cuda")
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_captured_graph(backend, name, record_property):
    note(record_property, backend, name, GRAPHS[name], replayed)


def note(record_property, backend, name, case, judge):
    """Judge, and leave what became of it in the test's report."""
    told: dict[str, Any] = {"asked": {**asked(case), **case.get("options", {})}}
    try:
        done = judge(PLATFORM, backend, case)
        told |= {"verdict": "; ".join(done.found) or "right", "through": done.through}
    except (Refused, BindError) as e:
        told["verdict"] = f"refused: {e}"
        pytest.skip(f"{backend}: {e}")
    except Exception as e:
        told["verdict"] = f"failed: {type(e).__name__}: {e}"
        raise
    finally:
        record_property("ran", (backend, name, told))
    assert not done.found


@pytest.mark.parametrize("name", ["prefill", "encoder", "mla decode"])
def test_a_wrong_kernel_would_be_noticed(name, monkeypatch):
    """q off by a percent behind the reference's back."""
    original = judged_steps.moved

    def off(made, group):
        step = original(made, group)
        q = tuple(x * 1.01 for x in step.q) if isinstance(step.q, tuple) else step.q * 1.01
        return SimpleNamespace(run=replace(step, q=q).run, want=step.want, batch=step.batch, plan=step.plan)

    assert judged(PLATFORM, "torch_native", CASES[name]).found == []
    monkeypatch.setattr(judged_steps, "moved", off)
    assert judged(PLATFORM, "torch_native", CASES[name]).found
