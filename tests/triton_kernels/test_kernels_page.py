"""docs/kernels.md was printed from the tiles that are chosen today, and shows every architecture that is claimed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from aot_cases import ARCHS, CASES, SHARED, refused

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
TABLES = {m[1]: m[2] for m in re.finditer(r"^### (.+?) \(\w+\)\n(.*?)(?=^### |^<!--)", PAGE, re.MULTILINE | re.DOTALL)}


def test_every_table_is_of_a_case():
    assert len(TABLES) >= 10
    assert set(TABLES) <= set(CASES)


@pytest.mark.parametrize("name", TABLES)
def test_table_shows_what_is_launched(name):
    shown = {}
    for line in re.findall(r"^\| (?:sm_|gfx).*\|$", TABLES[name], re.MULTILINE):
        arch, tile, warps, stages, _, _, shared, _, _ = (cell.strip() for cell in line.strip("|").split("|"))
        shown[arch] = (tile, warps, stages)
        assert shared.endswith(f"({SHARED[arch]})"), "run docs/print_kernels.py"
    for arch in ARCHS:
        if refused(name, arch):
            assert arch not in shown
            continue
        c = CASES[name].launches(arch)[0].constants
        now = (f"{c['BLOCK_M']} x {c['BLOCK_N']}", str(c["num_warps"]), str(c["num_stages"]))
        assert shown[arch] == now, "tiles have changed: run docs/print_kernels.py"
