"""The fleets' page: its file, its commands and its code are run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from docblocks import blocks, commands

from attn_core.fleet import FleetDecision

ROOT = Path(__file__).parents[3]
PAGE = blocks((ROOT / "docs" / "fleets.md").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "tests" / "data" / "models" / "gpt-oss-20b.json", tmp_path)
    (file,) = [b for b in PAGE if b.kind == "file"]
    (tmp_path / file.argument).write_text(file.body)
    monkeypatch.chdir(tmp_path)


def code(argument: str) -> list[str]:
    found = [b.body for b in PAGE if (b.kind, b.argument, b.language) == ("run", argument, "python")]
    assert found
    return [body.replace("get_platform()", 'get_platform("cpu")') for body in found]


def test_every_block_is_run() -> None:
    assert {(b.kind, b.language) for b in PAGE} == {("file", "json"), ("run", "console"), ("run", "python")}


def test_the_commands_answer() -> None:
    (block,) = [b for b in PAGE if b.language == "console"]
    answers = []
    for command, _ in commands(block.body):
        words = shlex.split(command)
        assert words[0] == "attn-core"
        run = [sys.executable, "-m", "attn_core.cli", *words[1:]]
        done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    resolved, explained, data = answers
    assert "ranks 8 to 15 (rocm:gfx942)" in resolved
    assert "page_size 64" in explained.splitlines()[1]
    fleet = FleetDecision.from_json(data)
    assert json.loads(data)["digest"] == fleet.digest
    assert fleet.digest in resolved


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {}
    for body in code(""):
        exec(body, space)
    first, headline, reason, ways, last = capsys.readouterr().out.splitlines()
    assert first.split()[1:] == ["fa3", "aiter"]
    assert "ranks 8 to 15 (rocm:gfx942): no installed plugin offers backend 'fa3'" in headline
    assert reason.startswith("ranks 8 to 15 (rocm:gfx942) ")
    assert "without ranks 8 to 15 (rocm:gfx942): " in ways
    assert last.startswith("4 1 ")


def test_the_code_for_ranks_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_PLATFORM", "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    try:
        for body in code("ranks"):
            exec(body, {})
    finally:
        dist.destroy_process_group()
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[1] == second
