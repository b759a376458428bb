"""docs/vllm.md: its Python runs, in vLLM's environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def code(name: str) -> str:
    """All blocks of that name, one after the other."""
    found = re.findall(rf"^<!-- run: {name} -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return "\n".join(found)


@pytest.fixture
def program(model: Callable[[str], Any], tmp_path: Path) -> Callable[..., str]:
    """Runs code of the page as a program, in a folder where ``model`` is a model; returns all it printed."""

    def run(name: str) -> str:
        (tmp_path / "model").symlink_to(model("llama").folder)
        (tmp_path / "program.py").write_text(code(name))
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_every_python_block_is_run() -> None:
    assert PAGE.count("```python") == len(
        re.findall(r"^<!-- run: (?:engine|select) -->\n```python", PAGE, re.MULTILINE)
    )


def test_an_engine_runs_on_attn_core(program: Callable[..., str]) -> None:
    told = program("engine")
    assert re.search(r"attn-core decided [0-9a-f]{16} for LlamaForCausalLM on cpu:\S+: full: vllm_cpu", told)
    assert re.search(r"^\[\d+(, \d+){7}\]$", told, re.MULTILINE)


def test_a_platform_asks(program: Callable[..., str]) -> None:
    told = program("select")
    assert "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend" in told
    assert re.search(r"^vllm_cpu [0-9a-f]{16}$", told, re.MULTILINE)
    assert "Selected backend CPU_ATTN is not valid on cpu:" in told
    assert "page_size" in told
