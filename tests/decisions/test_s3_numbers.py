"""S3.3: the padded encoder against torch_native in half precision, and no width that outlives its group."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from attn_core import Batch
from simulators import cuda_flashinfer
from simulators.harness import Case, bound, device, rows_of
from simulators.standin import installed


@pytest.fixture(autouse=True)
def small_workspaces(monkeypatch):
    from attn_plugin_cuda import memory

    monkeypatch.setattr(memory, "WORKSPACE_BYTES", 1 << 16)
    for module in [m for n, m in list(sys.modules.items()) if n.startswith("simulators.cuda_flashinfer")]:
        if hasattr(module, "WORKSPACE_BYTES"):
            monkeypatch.setattr(module, "WORKSPACE_BYTES", 1 << 16)


def encoder(width, heads=12):
    rows = rows_of("cuda", device("cuda", "sm_80"), "flashinfer")
    spec = {
        "attn_type": "encoder_only",
        "head_dim": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "dtype": "float16",
    }
    with installed(cuda_flashinfer.stand_in()):
        return bound(rows, Case(name="", spec=spec, lse=False))


def run(group, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), group.spec.num_heads, group.spec.head_dim)
    q, k, v = (torch.randn(shape, generator=g).half() for _ in range(3))
    got = group.forward(q, k, v, None, group.plan(Batch(lengths, attn_type="encoder_only")))
    parts = zip(*(t.float().transpose(0, 1).split(lengths, 1) for t in (q, k, v)))
    want = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)
    return got, want


def test_3_half_precision_is_as_close_as_published():
    """allclose(rtol=1e-2, atol=1e-3); mean absolute error 1.9e-5, maximum 9.8e-4 (sglang PR 6230)."""
    group = encoder(32)
    assert group.bindings["encode"].head_dim == 64
    got, want = run(group, [128, 5, 77, 200])
    assert got.shape == want.shape
    error = (got.float() - want).abs()
    assert torch.allclose(got.float(), want, rtol=1e-2, atol=1e-3)
    assert error.mean() < 6e-5
    assert error.max() <= 9.8e-4


def test_2_widths_of_two_models_in_one_process_do_not_meet():
    """32 -> 64 and 96 -> 128, bound one after the other and run in turn."""
    narrow, wide = encoder(32), encoder(96)
    assert [g.bindings["encode"].head_dim for g in (narrow, wide)] == [64, 128]
    for group in (narrow, wide, narrow):
        got, want = run(group, [9, 30])
        assert torch.allclose(got.float(), want, rtol=1e-2, atol=2e-3)
        assert group.scale == pytest.approx(group.spec.head_dim**-0.5)
