"""``allreduce_fusion`` over real gloo groups of processes, and all that is refused before a rank is asked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from attn_core import AttentionSpec, BadInputError, BindError, MissingKernelError, get_platform, simulate
from attn_core.runtime import AllReduceFusion
from attn_core.runtime.allreduce import bind_allreduce

RANK, TESTS = Path(__file__).with_name("allreduce_rank.py"), Path(__file__).parents[1]
HIDDEN = 64

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


def ranks(size: int, backend: str) -> list[dict[str, Any]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    alive = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(i), str(size), str(port), backend],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
        )
        for i in range(size)
    ]  # fmt: skip
    try:
        out = [p.communicate(timeout=120) for p in alive]
    finally:
        for p in alive:
            p.kill()
    assert all(p.returncode == 0 for p in alive), [err for _, err in out]
    return [json.loads(text.splitlines()[-1]) for text, _ in out]


@pytest.mark.parametrize(("size", "backend"), [(2, "unfused"), (3, "unfused"), (2, "flashinfer"), (4, "flashinfer")])
def test_ranks_together_against_float64(size: int, backend: str) -> None:
    for r in ranks(size, backend):
        assert max(r["errors"]) < 2 + size / 2, r  # one rounding per rank that is added, one of the residual, one after
        closed, width, swapped = r["texts"]
        assert "is closed" in closed
        assert "decided for tensor_parallel" in swapped
        assert ("hidden_size=260 is not accepted; accepted: multiples of 8" in width) is (backend == "flashinfer")
        assert r["open"] == 0


def alone(**asked: Any) -> AllReduceFusion:
    """One rank, without a process group, on this CPU."""
    attn = get_platform("cpu").attention_backend(num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")
    return attn.allreduce_fusion(**{"hidden_size": HIDDEN, "max_tokens": 8, **asked})


def test_one_rank_needs_no_group() -> None:
    x, residual, weight = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), torch.rand(HIDDEN)
    want = torch.nn.functional.rms_norm((x + residual).double(), (HIDDEN,), weight.double(), 1e-6)
    with alone() as fused:
        out, after = fused(x, residual, weight, eps=1e-6)
        assert torch.equal(after, x + residual)
        assert torch.allclose(out.double(), want, rtol=1e-5, atol=1e-6)
        nothing = torch.empty(0, HIDDEN)
        assert fused(nothing, nothing.clone(), weight, eps=1e-6)[0].shape == (0, HIDDEN)
    with pytest.raises(BadInputError, match="is closed"):
        fused(x, residual, weight, eps=1e-6)
    fused.close()


X = torch.zeros(2, HIDDEN)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(9, HIDDEN)}, "9 tokens, bound for max_tokens=8"),
        (
            {"x": torch.zeros(2, HIDDEN + 1)},
            r"x is .*\(2, 65\) on cpu; expected contiguous torch.float32 \(2, 64\) on cpu",
        ),
        ({"x": torch.zeros(HIDDEN, 2).T}, "x is .*, not contiguous; expected"),
        ({"x": X.half()}, "x is torch.float16"),
        ({"residual": torch.zeros(3, HIDDEN)}, r"residual is torch.float32 \(3, 64\)"),
        ({"weight": torch.zeros(HIDDEN + 1)}, "weight is"),
        ({"out": torch.zeros(2, HIDDEN, dtype=torch.float64)}, "out is torch.float64"),
        ({"x": torch.zeros(2, HIDDEN, device="meta")}, "on meta; expected .* on cpu"),
        ({"residual": X.to("meta")}, "residual is .* on meta; expected .* on cpu"),
        ({"weight": torch.ones(HIDDEN, device="meta")}, "weight is .* on meta"),
        ({"residual": X, "out": X}, "out must be memory of its own, or x"),
    ],
)
def test_bad_tensors(change: dict[str, torch.Tensor], text: str) -> None:
    given = {"x": torch.zeros(2, HIDDEN), "residual": X, "weight": torch.ones(HIDDEN), **change}
    with pytest.raises(BadInputError, match=text):
        alone()(**given, eps=1e-6)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"hidden_size": 0}, "hidden_size=0 is not accepted; accepted: a whole number from 1 up"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"dtype": torch.float16}, "dtype=torch.float16 was not decided for; decided for: float32"),
    ],
)
def test_bad_sizes(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInputError, match=text):
        alone(**asked)


def bound(device: str, ranks: int) -> Any:
    model = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    return bind_allreduce(
        simulate(device).resolve(model, tensor_parallel=ranks), torch.device("cpu"),
        rank=0, process_group=None, hidden_size=256, max_tokens=8, dtype=torch.bfloat16,
    )  # fmt: skip


def test_more_ranks_need_a_group() -> None:
    with pytest.raises(BadInputError, match=r"2 tensor-parallel ranks, but torch.distributed is not initialised"):
        bound("cpu:avx2", 2)


def test_a_missing_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.runtime.allreduce._check_group", lambda *_: None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer.comm", None)
    with pytest.raises(MissingKernelError, match=r"flashinfer.*pip install") as e:
        bound("cuda:sm_90", 2)
    assert e.value.backend == "flashinfer"


def test_what_bind_returns_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.backends.allreduce.bind", lambda b: None)
    with pytest.raises(BindError, match=r"returned NoneType; expected AllReduceKernel\(call, close\)"):
        alone()
    monkeypatch.setattr("attn_core.backends.allreduce.bind", lambda b: 1 // 0)
    with pytest.raises(BindError, match="ZeroDivisionError"):
        alone()


@pytest.mark.parametrize("ranks", [1, 3, 6, 16])
def test_flashinfer_fuses_for_2_4_and_8_ranks_only(ranks: int) -> None:
    """Its workspace takes up to 16, and the kernels then refuse, or its rule raises, at the first step."""
    model = AttentionSpec(num_heads=48, num_kv_heads=48, head_dim=128, dtype="bfloat16")
    decision = simulate("cuda:sm_90").resolve(model, tensor_parallel=ranks, world_size=48)
    assert decision.backend("allreduce_fusion") == "unfused"
