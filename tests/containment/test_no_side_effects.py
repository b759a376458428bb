"""Importing core and asking every plugin for its facts imports no torch, no vendor's library, and opens no device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dists import distribution

AUDITED = Path(__file__).with_name("audited.py")
PLUGINS = Path(__file__).parents[2] / "plugins"
HEAVY = {
    "torch", "triton", "numpy", "vllm", "sglang", "flashinfer", "flash_attn", "flash_attn_interface", "flash_mla",
    "sgl_kernel", "aiter", "mate", "torch_npu", "torch_musa", "torchada", "intel_extension_for_pytorch", "transformers",
}  # fmt: skip
VENDOR_DEVICES = re.compile(r"device /dev/(nvidia|kfd|dri|davinci|mtgpu|accel|infiniband)")


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The repository's own plugins, made discoverable whether or not they are installed."""
    site = tmp_path_factory.mktemp("site")
    path = [str(site)]
    for project in sorted(PLUGINS.glob("*/pyproject.toml")):
        dist = re.search(r'^name = "(attn-plugin-\w+)"', project.read_text(), re.MULTILINE)
        entry = re.search(r'^(\w+) = "(attn_plugin_\w+)"', project.read_text(), re.MULTILINE)
        assert dist is not None, project
        assert entry is not None, project
        if (project.parent / "src" / entry[2] / "__init__.py").exists():
            distribution(site, dist[1], {entry[1]: entry[2]})
            path.append(str(project.parent / "src"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(AUDITED)], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_every_plugin_works(audit: dict[str, Any]) -> None:
    assert audit["plugins"]["core"] == "ok"
    assert set(audit["plugins"].values()) <= {"ok", "absent"}, audit["plugins"]
    assert audit["devices"][-1].startswith("cpu:")


def test_nothing_heavy_is_imported(audit: dict[str, Any]) -> None:
    imported = {t.removeprefix("import ") for t in audit["asked"] if t.startswith("import ")} | set(audit["modules"])
    assert "attn_core" in imported, "the audit sees nothing"
    assert not imported & HEAVY


def test_no_library_is_loaded_no_device_opened_and_no_process_started_to_ask_for_facts(audit: dict[str, Any]) -> None:
    assert not [t for t in audit["asked"] if t.startswith("dlopen") and t != "dlopen None"]
    assert not [t for t in audit["asked"] if VENDOR_DEVICES.match(t)]
    assert "child" not in audit["asked"]


def test_probing_happens_in_one_child_and_touches_nothing_here(audit: dict[str, Any]) -> None:
    assert [t for t in audit["probed"] if t == "child"] == ["child"] * (len(audit["plugins"]) > 1)
    assert not [t for t in audit["probed"] if t.startswith("dlopen") or VENDOR_DEVICES.match(t)]
