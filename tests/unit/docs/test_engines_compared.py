"""The comparison's last column is what attn-core decides today, and what it is compared with differs from that."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

sys.path.append(str(ROOT / "docs"))
compared = importlib.import_module("print_engines_compared")

RIGHT_ALONE = {"GPT-OSS 20B, sinks"}
"""Where SGLang decides the same: the row is there for what happened to another engine."""


def test_the_table_is_up_to_date() -> None:
    page = compared.PAGE.read_text(encoding="utf-8")
    assert compared.render(page) == page, "run `python docs/print_engines_compared.py`"


@pytest.mark.parametrize(
    "case", [c for c in compared.CASES if c.alone and c.what not in RIGHT_ALONE], ids=lambda c: f"{c.what} {c.device}"
)
def test_attn_core_does_not_decide_what_is_wrong(case: Any) -> None:
    """Refused, or something else than the backend (and the page size) that SGLang ends with."""
    says = case.alone.says
    wrong = [f"`{says['attention_backend']}`"]
    if "page_size" in says:
        wrong.append(f"page {says['page_size']}")
    answer = compared.decided(case)
    assert answer.startswith("refused: ") or not all(part in answer for part in wrong)
