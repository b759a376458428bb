"""Real SGLang engines, each in processes of its own: started once, asked for all that several tests look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import no_cuda_torchvision  # noqa: F401 (before anything looks for torchvision)
import pytest
import sglang_models as models

os.environ["SGLANG_PLATFORM"] = "attn_core"  # read when SGLang is first imported, here and in what is started here

RUNNER = Path(__file__).with_name("sglang_run.py")


class Model:
    """A toy model on disk with the tokens that transformers says."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.want = models.make(name, folder)


class Run:
    """What one engine said, and what was noted in its scheduler; nothing is noted while another backend runs."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model = model
        self.said: dict[str, list[list[int]]] = json.loads((folder / "said.json").read_text())
        noted = folder / "notes.json"
        self.notes: dict[str, Any] = json.loads(noted.read_text()) if noted.exists() else {}

    def score(self, mode: str = "right") -> int:
        """Tokens that are those of transformers, of ``models.ALL``."""
        return sum(a == b for got, want in zip(self.said[mode], self.model.want) for a, b in zip(got, want))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """``model(name)``, made once."""
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = Model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def run(model: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``run(name, modes=[...], again=[...], **arguments of Engine)``: start, ask, shut down."""

    def start(name: str, *, modes: tuple[str, ...] = (), again: Any = (), **arguments: Any) -> Run:
        chosen, folder = model(name), tmp_path_factory.mktemp("run")
        asked = {
            "model": str(chosen.folder), "folder": str(folder), "arguments": arguments, "modes": modes, "again": again,
            "prompts": models.prompts(), "new_tokens": models.NEW_TOKENS,
        }  # fmt: skip
        environment = {**os.environ, "SGLANG_RUN": json.dumps(asked), "OMP_NUM_THREADS": "2"}
        if arguments.get("tp_size", 1) == 2:  # without it SGLang wants a NUMA node per rank
            cores = sorted(os.sched_getaffinity(0))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
        done = subprocess.run(
            [sys.executable, str(RUNNER)], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return Run(chosen, folder)

    return start
