"""The commands of docs/sglang.md do what it says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

sys.path.append(str(ROOT / "tests" / "unit" / "docs"))
from docblocks import blocks, commands  # noqa: E402

PAGE = (ROOT / "docs" / "sglang.md").read_text(encoding="utf-8")
BLOCKS = blocks(PAGE)
COMMANDS = [pair for b in BLOCKS if b.kind == "run" for pair in commands(b.body)]


@pytest.fixture
def folder(tmp_path: Path, model: Callable[[str], Any]) -> Path:
    """The files of the page beside a model, and a start-up module that mends torchvision in every process."""
    for block in BLOCKS:
        if block.kind == "file":
            (tmp_path / block.argument).write_text(block.body, encoding="utf-8")
    shutil.copytree(model("llama").folder, tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text("import no_cuda_torchvision\n")
    return tmp_path


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_commands(command: str, shown: list[str], folder: Path) -> None:
    """Every line shown is the beginning, or a part, of a line of the real output, in order."""
    words = shlex.split(command)
    settings = dict(w.split("=", 1) for w in words if "=" in w and not w.startswith("-"))
    program = {"python": [], "attn-core": ["-m", "attn_core.cli"]}[words[len(settings)]]
    plain = {k: v for k, v in os.environ.items() if k != "SGLANG_PLATFORM"}
    done = subprocess.run(
        [sys.executable, *program, *words[len(settings) + 1 :]], cwd=folder, text=True, timeout=300, check=False,
        env={**plain, "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]), **settings},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    lines = iter(done.stdout.splitlines())
    assert shown
    for text in shown:
        assert any(text in line for line in lines), f"{text!r} is not in, or not in order:\n{done.stdout[-4000:]}"
