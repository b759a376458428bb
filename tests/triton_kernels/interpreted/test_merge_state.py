"""Joining two partial results: against float64, with sides that saw nothing, in place, and over strided views."""

from __future__ import annotations

import pytest
import torch
from triton_cases import bind

from attn_core.backends.triton.merge_state import merge_state
from attn_core.spec import AttentionSpec
from attn_core.testing.reference import merged

INF = float("inf")


def sides(dtype, width=24, tokens=9, heads=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    o_a, o_b = (torch.randn(tokens, heads, width, generator=g).to(dtype) for _ in range(2))
    lse_a, lse_b = (4 * torch.randn(tokens, heads, generator=g) for _ in range(2))
    lse_a[0], lse_b[1] = -INF, -INF
    lse_a[2], lse_b[2] = -INF, -INF
    o_a[0], o_b[1], o_a[2], o_b[2] = (float("nan"),) * 4  # nobody looks there
    return o_a, lse_a, o_b, lse_b


def right(got, given):
    want, want_lse = merged(*(torch.nan_to_num(t, nan=0.0) if i in (0, 2) else t for i, t in enumerate(given)))
    out, lse = got
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[out.dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert not out[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 24, 128])
def test_against_float64(dtype, width):
    given = sides(dtype, width)
    right(merge_state(*given), given)


@pytest.mark.parametrize("where", [0, 2])
def test_in_place(where):
    given = sides(torch.float32)
    mine = [t.clone() for t in given]
    got = merge_state(*mine, out=mine[where])
    assert got[0] is mine[where]
    right(got, given)


def test_a_wide_side_and_a_narrow_one():
    """Chunks of context: the sum is float32, each part has the kernel's dtype."""
    o_a, lse_a, o_b, lse_b = sides(torch.float32)
    given = (o_a, lse_a, o_b.bfloat16(), lse_b)
    right(merge_state(*given), given)


def test_strided_views():
    o_a, lse_a, o_b, lse_b = sides(torch.float32)
    given = (o_a.transpose(0, 1).contiguous().transpose(0, 1), lse_a.T.contiguous().T, o_b, lse_b.T.contiguous().T)
    out = torch.empty(*o_a.shape[:2], 2 * o_a.shape[2])[..., : o_a.shape[2]]
    got = merge_state(*given, out=out)
    assert got[0] is out
    right(got, given)


def test_no_tokens():
    out, lse = merge_state(*(t[:0] for t in sides(torch.float32)))
    assert (out.shape, lse.shape) == ((0, 5, 24), (0, 5))


def test_a_group_of_these_kernels_merges_by_them():
    group = bind(AttentionSpec(num_heads=4, head_dim=32, dtype="float32"))
    assert group.merge_state is merge_state
