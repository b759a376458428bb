"""S5: MUSA through MATE (sgl-project/sglang PR 22051, 17985)."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from asking import CUDA, ask

import attn_plugin_musa
from attn_core.platform import installed_plugins, simulate
from attn_core.plugins import installed_packages
from dists import distribution
from simulators import musa_mate
from simulators.harness import DECODE, Case, bound, device, make_step, rows_of
from simulators.standin import installed

KERNELS = Path(attn_plugin_musa.__file__).parent / "kernels"


@pytest.mark.parametrize("where", ["musa:mp31", "musa:s5000"])
def test_1_mate_serves_mp31(where):
    assert ask("llama-3.1-8b", where).chosen() == ("fa3", "fa3")
    assert ask("gpt-oss-20b", where).chosen("sliding") == ("fa3", "fa3")


@pytest.mark.parametrize("where", ["musa:mp21", "musa:mp22", "musa:s4000"])
def test_1_and_no_chip_before_it(where):
    answer = ask("llama-3.1-8b", where)
    assert "fa3" not in answer.everywhere
    assert answer.reasons(backend="fa3", role="decode", code="isa") or answer.reasons(
        backend="fa3", role="decode", field="device.arch"
    )


def group_of(name="decode", **spec):
    case = Case(name=name, spec=spec, lengths=DECODE)
    with installed(musa_mate.stand_in()):
        return bound(rows_of("musa", device("musa", "mp31"), "fa3"), case), case


def test_1_the_implementation_is_held_as_the_instances_functions():
    """What bind found is what every call uses, whatever is importable later."""
    group, case = group_of()
    step = make_step(group, case)
    held = group.decode
    assert "mate.mha_interface" not in sys.modules, "the package is gone again, the functions are held"
    assert step.run().shape == step.q.shape
    assert group.decode is held
    calls = [
        node
        for file in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "call"
    ]
    assert calls
    named = {n.id for call in calls for n in ast.walk(call) if isinstance(n, ast.Name)}
    assert not named & {"load", "importlib", "import_module", "getattr", "version"}


@pytest.mark.parametrize("arch", CUDA)
def test_1_editing_musa_cannot_change_what_cuda_chooses(arch):
    """Same backend name, another platform: with MATE's plugin absent every decision for NVIDIA is the same."""
    ours = ask("llama-3.1-8b", f"cuda:{arch}").data
    assert {r["plugin"] for r in ours["rejections"]} <= {"cuda", "core"}
    assert {c["plugin"] for g in ours["groups"].values() for r, c in g.items() if r != "values"} <= {"cuda", "core"}


def test_2_metadata_belongs_to_the_plan_of_one_step():
    """Two batches in flight, planned before either runs, and a second backend built in between."""
    group, case = group_of()
    first, second = make_step(group, case, 0), make_step(group, case, 1)
    other, _ = group_of(sliding_window=5)
    make_step(other, case, 2)
    assert first.plan.decode is not second.plan.decode
    for step in (second, first):
        step.check()


def test_3_cu_seqlens_k_new_is_never_passed():
    for file in KERNELS.glob("*.py"):
        code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL)
        assert "cu_seqlens_k_new" not in code


@pytest.mark.parametrize(("module", "there"), [("mate", "musa:mp31"), ("aiter", "rocm:gfx942")])
def test_4_strangers_on_pypi_are_not_taken_for_the_vendors(tmp_path, monkeypatch, module, there):
    """Installed under the name, at a version that would fit, with none of the vendor's modules."""
    distribution(tmp_path, module, version="99.0", modules={f"{module}.__init__": "raise RuntimeError('imported')"})
    monkeypatch.syspath_prepend(tmp_path)
    plugins = installed_plugins()
    where = simulate(there).device
    found = installed_packages(plugins.catalog((where,)), (where,))
    wanted = {r.name for d in plugins.catalog((where,)).devices.values() for b in d.backends for r in b.requires
              if module in r.name}  # fmt: skip
    assert wanted
    assert module not in sys.modules
    for package in wanted & set(found.versions):
        assert package in found.impostors, found
