"""The README's code runs, and its explanation is what the command prints today."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ROOT / "tests" / "data" / "models"


def block(name: str) -> str:
    """The fenced block after ``<!-- test: name -->``."""
    found = re.search(rf"<!-- test: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no block {name!r}"
    return found[1]


def test_the_explanation_is_real():
    command = next(c for c in re.findall(r"<!-- test: (.*?) -->", README) if c.startswith("attn-core"))
    args = [sys.executable, "-m", "attn_core.cli", *shlex.split(command)[1:]]
    out = subprocess.run(args, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert block(command) == out


def test_the_engine_code_runs(tmp_path, monkeypatch):
    shutil.copy(MODELS / "qwen2.5-0.5b.json", tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)
    table = torch.tensor([[1, 2]], dtype=torch.int32)
    steps = [([5], [5], table, torch.arange(16, 21)), ([5], [10], table, torch.arange(21, 26))]
    q = torch.randn(5, 14, 64).bfloat16()
    k, v = (torch.randn(5, 2, 64).bfloat16() for _ in range(2))
    space = {"steps": steps, "q": q, "k": k, "v": v}
    exec(block("engine"), space)
    assert space["out"].shape == q.shape
    assert space["out"].isfinite().all()


def test_commands_and_links_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
