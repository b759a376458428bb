"""What the five distributions tell an installer, and what they must not pull in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3] / "plugins"
NAMES = ("cuda", "musa", "rocm", "ascend", "intel")
STRANGERS = {"mate", "aiter", "amd-aiter", "torch-musa", "torch_musa"}
"""Names that PyPI lacks, or has for another project."""


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def project(name: str) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")
    return dict(tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"])


def test_distribution_and_entry_point(name: str, project: dict[str, Any]) -> None:
    assert project["name"] == f"attn-plugin-{name}"
    assert project["requires-python"] == ">=3.10"
    assert project["entry-points"] == {"attn_core.v1": {name: f"attn_plugin_{name}"}}
    assert (ROOT / name / "src" / f"attn_plugin_{name}" / "py.typed").exists()


def test_only_the_core_is_pulled_in(project: dict[str, Any]) -> None:
    assert project["dependencies"] == ["attn-core"]
    extras = [r for extra in project.get("optional-dependencies", {}).values() for r in extra]
    assert not {re.split(r"[<>=!~\[ ]", r)[0].lower() for r in extras} & STRANGERS


def test_version_is_the_modules(name: str, project: dict[str, Any]) -> None:
    source = (ROOT / name / "src" / f"attn_plugin_{name}" / "__init__.py").read_text()
    assert f'__version__ = "{project["version"]}"' in source


def test_reader_is_told_what_binds_and_what_ran(name: str) -> None:
    """A plugin without adapters says so; one with adapters says where they ran."""
    package = ROOT / name / "src" / f"attn_plugin_{name}"
    binds = (package / "kernels").is_dir()
    words = " ".join((ROOT / name / "README.md").read_text().split())
    assert ("What ran" in words) is binds
    assert ("Declarations only" in words) is not binds
