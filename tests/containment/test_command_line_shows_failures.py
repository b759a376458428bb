"""What a user sees of a broken plugin: doctor, plugins, resolve, and the exit status under strict mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scenarios import SCENARIOS, build

from dists import strangers

pytest.importorskip("click")
pytest.importorskip("rich")
MODEL = Path(__file__).parents[1] / "data" / "models" / "qwen2.5-0.5b.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    build(folder)
    return folder


def attn_core(root: Path, scenario: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = [str(root / scenario), str(root / "healthy"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "ATTN_CORE_DISABLE_PLUGINS": ",".join(strangers()),
        **environ,
    }
    command = [sys.executable, "-m", "attn_core.cli", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bad(plugins: list[dict[str, Any]]) -> dict[str, Any]:
    return next(p for p in plugins if p["name"] == "bad")


@pytest.mark.parametrize("name", ["probe-dies", "backends-midway"])
def test_doctor_names_the_culprit_and_still_lists_the_rest(root: Path, name: str) -> None:
    seen = answer(attn_core(root, name, "doctor", "--json"))
    assert bad(seen["plugins"])["status"] == "failed"
    assert SCENARIOS[name].error in bad(seen["plugins"])["error"]
    assert [d["platform"] for d in seen["devices"]] == ["acme", "cpu"]


def test_plugins_lists_it_and_no_import_imports_nothing(root: Path) -> None:
    name = "import-raises"
    listed = answer(attn_core(root, name, "plugins", "--no-import", "--json"))["plugins"]
    assert {"core", "acme", "bad"} <= {p["name"] for p in listed}
    assert not (root / name / "imported").exists()
    listed = answer(attn_core(root, name, "plugins", "--json"))["plugins"]
    assert SCENARIOS[name].error in bad(listed)["error"]
    assert (root / name / "imported").exists()


def test_a_decision_carries_it_and_strict_mode_refuses_to_decide(root: Path) -> None:
    question = ("resolve", "--model", str(MODEL), "--device", "acme:one", "--json")
    decision = answer(attn_core(root, "backends-midway", *question))
    assert decision["groups"]["full"]["decode"]["backend"] == "swift"
    assert SCENARIOS["backends-midway"].error in bad(decision["plugins"])["error"]
    refused = attn_core(root, "backends-midway", *question, ATTN_CORE_STRICT="1")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "plugin bad (acme-bad) failed: attn_backends item 3" in line
    assert refused.stdout == ""
