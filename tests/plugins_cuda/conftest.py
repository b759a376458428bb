"""Workspaces of a size that can be zeroed hundreds of times."""

from __future__ import annotations

import pytest

from attn_plugin_cuda import memory
from simulators import cuda_flashinfer_common

REAL = memory.WORKSPACE_BYTES


@pytest.fixture(autouse=True)
def small_workspaces(monkeypatch):
    assert REAL >= cuda_flashinfer_common.WORKSPACE_BYTES or cuda_flashinfer_common.WORKSPACE_BYTES == 1 << 16
    monkeypatch.setattr(memory, "WORKSPACE_BYTES", 1 << 16)
    monkeypatch.setattr(cuda_flashinfer_common, "WORKSPACE_BYTES", 1 << 16)
