"""Real vLLM engines, in processes of their own: several engines share one, started once and asked for all that tests
look at. Whoever computed it, the tokens to compare with are transformers'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "common"))
import toy_models as toys

RUNNER = Path(__file__).with_name("vllm_run.py")


class Engine:
    """What one engine said, and what was noted in the process that ran its layers."""

    def __init__(self, model: Model, result: dict[str, Any], log: str) -> None:
        self.model, self.log = model, log
        self.said: dict[str, list[list[int]]] = result["said"]
        self.notes: dict[str, Any] = result["notes"]
        self.metrics: dict[str, float] = result["metrics"]

    def score(self, mode: str = "right") -> int:
        """Tokens as transformers has them, of ``toys.TOTAL``."""
        return toys.score(self.said[mode], self.model.want)

    def kernels(self) -> set[str]:
        """Backends that attended or wrote in layers of ours."""
        return {backend for roles in self.notes["kernels"].values() for backend in roles.values()}


class Model:
    """A toy model on disk with the tokens that transformers says."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.want = toys.make(name, folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = Model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def engines(
    model: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Engine]]:
    """``engines({name: {"model": ..., "arguments": {...}, "modes": [...]}}, VARIABLE=...)``: all in one process."""

    def start(runs: dict[str, dict[str, Any]], **environment: str) -> dict[str, Engine]:
        folder = tmp_path_factory.mktemp("run")
        models = {name: model(run["model"]) for name, run in runs.items()}
        asked = [
            {"prompts": toys.prompts(), **run, "name": name, "model": str(models[name].folder)}
            for name, run in runs.items()
        ]
        given = {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2", "ATTN_CORE_VLLM": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment,
            "VLLM_RUN": json.dumps({"folder": str(folder), "runs": asked}),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(RUNNER)], env={**os.environ, **given}, capture_output=True, text=True, timeout=400,
            check=False,
        )  # fmt: skip
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-6000:]
        results = json.loads((folder / "results.json").read_text())
        return {name: Engine(models[name], results[name], log) for name in runs}

    return start
