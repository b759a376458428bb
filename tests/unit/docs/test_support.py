"""The page of support is what the declarations print, and what it says of proof is true of the tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from attn_core.plugins import load_plugins

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "docs"))

import print_support  # noqa: E402


def test_page_is_current():
    assert print_support.PAGE.read_text(encoding="utf-8") == print_support.page(), "run: make docs"


def bound() -> set[tuple[str, str]]:
    """(plugin, backend) of every vendor row that has a bind function."""
    plugins, found = load_plugins(strict=False), set()
    for platform in plugins.platforms().values():
        for device in platform.known:
            rows = plugins.catalog((device,)).devices[str(device)].backends
            found |= {(r.plugin, r.backend) for r in rows if r.plugin != "core" and r.bind and r.role != "kv_write"}
    return found


@pytest.mark.parametrize(("plugin", "backend"), sorted(bound()))
def test_what_binds_is_run_by_a_test_of_its_plugin(plugin, backend):
    tests = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests" / f"plugins_{plugin}").glob("*.py"))
    assert re.search(rf'"{backend}"', tests), f"no test of plugins_{plugin} names {backend}"


def test_marks_of_proof_name_backends_that_exist():
    plugins = load_plugins(strict=False)
    rows = [
        r for p in plugins.platforms().values() for d in p.known for r in plugins.catalog((d,)).devices[str(d)].backends
    ]
    there = {(r.plugin, platform, r.backend) for r in rows for platform in (r.platform, "*")}
    assert set(print_support.PROOF) <= there


def test_only_what_a_record_holds_claims_to_have_run_on_an_accelerator():
    assert {platform for (_, platform, _), mark in print_support.PROOF.items() if mark == "h"} == {"cpu"}
    marked, platform, where = set(), "", ""
    for line in print_support.PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith(("## ", "**")):
            where = line.strip("#* ")
            platform = where if line.startswith("## ") else platform
        elif platform not in ("cpu", "Core, on every device") and "| h |" in line:
            marked |= {f"{platform}:{arch}" for arch in where.split(", ")}
    assert marked == set(print_support.RAN)


@pytest.mark.parametrize("where", sorted(print_support.RAN))
def test_what_ran_went_through_rows_that_exist(where):
    """A record outlives the rows it was made with; then it proves nothing, and the run is due again."""
    platform, _, arch = where.partition(":")
    plugins = load_plugins(strict=False)
    (device,) = (d for d in plugins.platforms()[platform].known if d.arch == arch)
    rows = plugins.catalog((device,)).devices[str(device)].backends
    there = {(r.backend, r.role, " ".join(filter(None, (r.bind, r.form)))) for r in rows}
    for backend, cases in print_support.RAN[where]["results"].items():
        for case in cases.values():
            assert {(backend, role, by) for role, by in case.get("through", {}).items()} <= there
