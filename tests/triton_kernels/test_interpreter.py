"""Runs the tests under ``interpreted`` in a process of its own, file by file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(p.name for p in (HERE / "interpreted").glob("test_*.py"))


def run(name: str, tmp_path: Path, *marks: str) -> None:
    paths = (str(HERE.parent / "numerics"), str(HERE / "interpreted"))
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *marks, str(HERE / "interpreted" / name)]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert "passed" in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name, tmp_path):
    run(name, tmp_path, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FILES if "mark.slow" in (HERE / "interpreted" / n).read_text()])
def test_more_under_the_interpreter(name, tmp_path):
    run(name, tmp_path, "-m", "slow")
