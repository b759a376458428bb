"""Every option and kind that docs/bench.md shows exists, and nothing it leaves out is new."""

from __future__ import annotations

import re
from pathlib import Path

from attn_core.bench.command import bench
from attn_core.bench.shapes import KINDS

TEXT = (Path(__file__).parents[3] / "docs" / "bench.md").read_text(encoding="utf-8")


def test_commands_in_the_page_are_commands_of_the_program():
    lines = [x.split("#")[0].split() for x in TEXT.splitlines() if x.startswith("attn-core bench")]
    assert len(lines) >= 5
    for words in lines:
        bench.make_context("bench", words[2:])


def test_the_page_names_every_kind_of_shape():
    listed = TEXT[TEXT.index("Kinds of shapes") : TEXT.index("How to read")]
    assert {k for k in re.findall(r"`(\w+)` [(]|`(mla_\w+)`", listed) for k in k if k} >= set(KINDS)
