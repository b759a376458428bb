"""A broken plugin costs itself only, is seen everywhere, and under strict mode is an error. One process asks it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scenarios import SCENARIOS, build

DRIVER = Path(__file__).with_name("driver.py")
DEVICES = ("acme:a1", "cpu:avx512_bf16")
NEVER_RUN = {"import-syntax", *(n for n, s in SCENARIOS.items() if s.twin or s.status == "incompatible")}


def ask(jobs: Mapping[str, Mapping[str, Any]], **environ: str) -> dict[str, Any]:
    lines = "".join(json.dumps(job) + "\n" for job in jobs.values())
    command = [sys.executable, str(DRIVER)]
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=120, env={**os.environ, **environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def answers(root: Path) -> dict[str, Any]:
    healthy = str(root / "healthy")
    strict = {"ATTN_CORE_STRICT": "1"}
    jobs: dict[str, Any] = {
        "healthy": {"path": [healthy], "devices": DEVICES, "environ": strict},
        "healthy/probed": {"path": [healthy], "probe": True, "environ": strict},
    }
    for name, s in SCENARIOS.items():
        path = [str(root / name), healthy]
        ways = {
            "deny": {"ATTN_CORE_DISABLE_PLUGINS": "bad", **strict},
            "allow": {"ATTN_CORE_PLUGINS": "acme", **strict},
        }
        for way, environ in ways.items():
            jobs[f"{name}/{way}"] = {"path": path, "devices": DEVICES, "environ": environ, "probe": s.probe}
        jobs[name] = {"path": path, "devices": DEVICES, "probe": s.probe, "timeout": 2}
        if name != "probe-hangs":  # its time limit, once more
            jobs[f"{name}/strict"] = {**jobs[name], "environ": strict}
            jobs[f"{name}/named"] = {**jobs[name], "environ": {"ATTN_CORE_PLUGINS": "acme,bad"}}
    jobs["lazy"] = {"path": [str(root / "lazy"), healthy], "devices": ["acme:a1"]}
    jobs["interrupt"] = {"path": [str(root / "interrupt"), healthy]}
    return ask(jobs)


def healthy(answers: dict[str, Any], name: str) -> dict[str, str]:
    """What the devices of the scenario get when nothing is broken: imagined ones, or those found here."""
    decisions: dict[str, str] = answers["healthy/probed" if SCENARIOS[name].probe else "healthy"]["decisions"]
    assert len(decisions) == 2
    return decisions


def report(reports: list[dict[str, Any]], name: str = "bad") -> dict[str, Any]:
    return next(r for r in reports if r["name"] == name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_other_plugins_decide_the_same_bytes(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["decisions"] == healthy(answers, name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_failure_is_in_reports_decisions_and_explanations(answers: dict[str, Any], name: str) -> None:
    answer, expected = answers[name], SCENARIOS[name]
    assert len(answer["listed"]) == len(answer["explained"]) == 2
    for reports in (answer["reports"], *answer["listed"].values()):
        bad = report(reports)
        assert bad["status"] == expected.status
        assert expected.error in bad["error"]
        assert bad["hint"]
        assert (bad["dist"], bad["version"]) == ("acme-bad", "1.0")
        assert [r["status"] for r in reports if r["name"] in ("core", "acme")] == ["ok", "ok"]
    for text in answer["explained"].values():
        assert expected.error in text
        assert "plugin bad" in text


@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.probe])
def test_a_broken_probe_costs_its_own_devices_only(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["found"] == answers["healthy/probed"]["found"]
    assert [d.partition(":")[0] for d in answers[name]["found"]] == ["acme", "cpu"]


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "probe-hangs"])
def test_strict_mode_and_naming_the_plugin_make_it_an_error(answers: dict[str, Any], name: str) -> None:
    for way in ("strict", "named"):
        answer = answers[f"{name}/{way}"]
        assert answer.get("raised") == "PluginError", answer
        assert "plugin bad (acme-bad)" in answer["text"]
        assert SCENARIOS[name].error in answer["text"]


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("way", ["deny", "allow"])
def test_deny_and_allow_lists_act_before_anything_can_go_wrong(answers: dict[str, Any], name: str, way: str) -> None:
    answer = answers[f"{name}/{way}"]
    assert report(answer["reports"])["status"] == "blocked"
    assert answer["decisions"] == healthy(answers, name)


def test_blocked_incompatible_and_rival_plugins_are_never_imported(root: Path, answers: dict[str, Any]) -> None:
    for name in SCENARIOS:
        assert (root / name / "imported").exists() is (name not in NEVER_RUN), name


def test_lists_keep_modules_from_being_imported(root: Path, tmp_path: Path) -> None:
    build(tmp_path)
    path = [str(tmp_path / "import-raises"), str(tmp_path / "healthy")]
    jobs = {
        "deny": {"path": path, "environ": {"ATTN_CORE_DISABLE_PLUGINS": "bad"}},
        "allow": {"path": path, "environ": {"ATTN_CORE_PLUGINS": "acme"}},
    }
    assert all("reports" in a for a in ask(jobs).values())
    assert not (tmp_path / "import-raises" / "imported").exists()


def test_a_lazy_module_is_registered_without_its_heavy_part(root: Path, answers: dict[str, Any]) -> None:
    assert report(answers["lazy"]["reports"], "lazy")["status"] == "ok"
    assert json.loads(answers["lazy"]["decisions"]["acme:a1"])["groups"]["full"]["decode"]["backend"] == "tempting"
    assert not (root / "lazy" / "imported").exists()


def test_an_interrupt_is_not_contained(answers: dict[str, Any]) -> None:
    assert answers["interrupt"].get("fatal") == "KeyboardInterrupt"


def test_healthy_answers_depend_on_no_hash_seed_and_no_order_of_the_path(root: Path, answers: dict[str, Any]) -> None:
    both = {"path": [str(root / "healthy"), str(root / "backends-midway")], "devices": DEVICES}
    for seed in ("1", "2"):
        (answer,) = ask({"again": both}, PYTHONHASHSEED=seed).values()
        assert answer["decisions"] == answers["healthy"]["decisions"]


def test_none_of_this_imports_torch(answers: dict[str, Any]) -> None:
    assert not any(a["torch"] for a in answers.values())
