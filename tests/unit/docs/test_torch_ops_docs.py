"""The page on torch operators: its code runs, in order, in one namespace, and its table is the operators there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from docblocks import blocks

from attn_core.integrations import torch_ops

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "torch-ops.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    found = [b for b in blocks(PAGE) if b.language == "python"]
    assert {b.kind for b in found} == {"run"}
    space: dict[str, Any] = {}
    for b in found:
        # The backend that needs no C++ toolchain: what is shown is tracing, not code generation.
        code = b.body.replace("dynamic=True", 'dynamic=True, backend="aot_eager"')
        exec(code.replace("get_platform()", 'get_platform("cpu")'), space)
    assert re.search(r"^full\.\d+$", capsys.readouterr().out, re.MULTILINE)
    assert space["compiled"].shape == (4, 256)
    assert all(t[3].any() and t[5].any() for t in space["cache"].data)
    torch._dynamo.reset()


def test_the_table_lists_every_operator_and_what_it_mutates() -> None:
    rows = re.findall(r"^\| `(\w+)\(.*\| (.*) \|$", PAGE, re.MULTILINE)
    told = {name: sorted(re.findall(r"`(\w+)`", mutated)) for name, mutated in rows}
    there = {}
    for name, *_ in torch_ops._OPERATORS:
        schema = getattr(torch.ops.attn_core, name).default._schema
        there[name] = sorted(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    assert told == there


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
