"""Every backend that can be bound on this machine's device, over one grid, judged in float64; ``make test-gpu``.

On a CPU it runs core's own backends, so that the harness itself is always tested.
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import judged as judged_steps
import pytest
import torch
from judged import CASES, GRAPHS, Refused, asked, judged, replayed

from attn_core import AttentionSpec, BindError, Device, EngineOptions, ModelSpec, get_platform
from attn_core.backends import builtin, torch_native
from attn_core.bench.case import candidates
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.domain import ANY
from attn_core.resolve import resolve
from attn_core.runtime.backend import bind_decision

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


class Elsewhere:
    """A GPU's decisions, bound to PyTorch's kernels on the CPU, as if those could be captured."""

    def attention_backend(self, **asked):
        device = Device(platform="cuda", arch="sm_90")
        rows = (replace(r, accepts={**r.accepts, "graph": ANY}) for r in torch_native.backends(device))
        names = {f.name for f in fields(AttentionSpec)}
        model = ModelSpec.of(AttentionSpec(**{n: v for n, v in asked.items() if n in names}))
        options = EngineOptions(**{n: v for n, v in asked.items() if n not in names})
        installed = Installed({"torch": torch.__version__})
        catalog = Catalog({str(device): DeviceCatalog((*rows, *builtin.backends(device)))})
        return bind_decision(resolve(device, model, options, catalog, installed), "cpu")


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_judged_right(name, monkeypatch):
    monkeypatch.setattr(judged_steps, "captured", lambda forward: forward)
    assert replayed(Elsewhere(), "torch_native", GRAPHS[name]).found == []


def test_a_graph_that_kept_its_first_step_would_be_noticed(monkeypatch):
    def captured(forward):
        runs = []
        return lambda: None if runs else runs.append(forward())

    monkeypatch.setattr(judged_steps, "captured", captured)
    assert replayed(Elsewhere(), "torch_native", GRAPHS["graph"]).found
