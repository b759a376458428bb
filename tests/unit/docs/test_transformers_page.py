"""The page on transformers: its code runs, in order, and prints what it says it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from docblocks import blocks

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")

torch.set_num_threads(1)


def test_every_python_block_is_run() -> None:
    assert {b.kind for b in blocks(PAGE) if b.language == "python"} == {"run"}


def test_the_page_runs_from_top_to_bottom(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for b in blocks(PAGE):
        if b.kind == "run":
            exec(b.body, space)
    told = capsys.readouterr().out
    assert "MistralForCausalLM on cpu:" in told
    assert re.search(r"^sliding decoder 8 1 \w+$", told, re.MULTILINE)
    assert "fa3" in told
    assert "attention mask hides or shows more than padding does" in told


def test_the_families_it_names_are_those_that_are_tested() -> None:
    families = re.findall(r'^    Family\(\s*"(\w+)"', _tested(), re.MULTILINE)
    (named,) = re.findall(r"^Tests compare (.*?) with eager", PAGE, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"[\s-]", "", named.lower()).replace("gemma2,3and4", "gemma2,gemma3,gemma4")
    plain = plain.replace("deepseekv3andv3.2", "deepseekv3,deepseekv32").replace("whisperandt5", "whisper,t5")
    assert sorted(plain.split(",")) == sorted(f.replace("_", "") for f in families)


def _tested() -> str:
    return (ROOT / "tests" / "integration" / "hf_families.py").read_text(encoding="utf-8")
