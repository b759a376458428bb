"""What docs/engines-compared.md says of SGLang's decisions: its own argument resolution, told where it runs.

In a process of its own, without our platform and plugins.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

sys.path.append(str(ROOT / "docs"))
compared = importlib.import_module("print_engines_compared")
CASES = [c for c in compared.CASES if c.alone]


def cuda(major: int) -> dict[str, Any]:
    facts = {
        "is_cuda": True, "is_blackwell": major in (10, 11, 12), "is_sm100_or_sm110": major in (10, 11),
        "is_hopper_with_cuda_12_3": major == 9, "has_flashinfer": True, "device_sm": 10 * major,
        "device_capability": (major, 0),
    }  # fmt: skip
    return facts | {f"is_sm{10 * m}": major == m for m in (9, 10, 11, 12)}


FACTS: dict[str, dict[str, Any]] = {
    "cuda:sm_90": cuda(9),
    "cuda:sm_100": cuda(10),
    "cuda:sm_110": cuda(11),
    "cuda:sm_120": cuda(12),
    "rocm:gfx942": {"is_hip": True, "device_sm": 94, "device_capability": (9, 4)},
    "musa:mp31": {"is_musa": True},
    "xpu:bmg": {"is_xpu": True},
    "ascend:910b": {"is_npu": True},
}
"""Device -> what SGLang's own probes say of it (``runtime_context.override_platform``)."""

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import no_cuda_torchvision
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import ServerArgs

answers = []
for config, facts, arguments, asked in json.loads(sys.stdin.read()):
    folder = Path(tempfile.mkdtemp())
    config = json.loads(Path(config).read_text())
    config.pop("quantization_config", None)  # mxfp4 would be refused: it has no kernels here
    folder.joinpath("config.json").write_text(json.dumps(config))
    common = {"device": "cuda", "skip_tokenizer_init": True, "mem_fraction_static": 0.8}
    with override_platform(**facts):
        args = ServerArgs(model_path=str(folder), **common, **arguments)
        args.resolve_once()
        answers.append({name: resolution_result(args, name) for name in asked})
print("ANSWER", json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[int, dict[str, Any]]:
    questions = [
        (str(compared.path(c.model)), FACTS[c.device], dict(c.alone.arguments), list(c.alone.says)) for c in CASES
    ]
    environment = {k: v for k, v in os.environ.items() if k != "SGLANG_PLATFORM"} | {"SGLANG_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(questions), env=environment, cwd=Path(__file__).parent,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert told, done.stderr[-3000:]
    return dict(enumerate(json.loads(told[0].removeprefix("ANSWER "))))


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{CASES[i].what} {CASES[i].device}")
def test_sglang_decides_as_the_page_says(index: int, answers: dict[int, dict[str, Any]]) -> None:
    assert answers[index] == dict(CASES[index].alone.says)
