"""Two halves of the keys merge into attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simple_kernels import dense

from attn_core.runtime import merge_state


def states(keys: int, cut: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    """Whole, first and second part of one attention: three pairs of output and lse, in float64."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(n, h, d, generator=g, dtype=torch.float64) for n, h, d in ((5, 6, 8), (keys, 2, 8), (keys, 2, 7))
    )
    out: list[torch.Tensor] = []
    for part in (slice(None), slice(0, cut), slice(cut, None)):
        visible = torch.ones(5, k[part].shape[0], dtype=torch.bool)
        out.extend(dense(q, k[part], v[part], scale, visible))
    return out


@given(st.integers(2, 12), st.data())
def test_parts_make_the_whole(keys: int, data: st.DataObject) -> None:
    o, lse, *parts = states(keys, data.draw(st.integers(0, keys)), scale=data.draw(st.sampled_from([0.1, 1.0, 40.0])))
    got, got_lse = merge_state(*parts)
    torch.testing.assert_close(got, o)
    torch.testing.assert_close(got_lse, lse)


def test_lse_is_a_natural_logarithm() -> None:
    one = torch.ones(1, 1, 2)
    o, lse = merge_state(one, torch.zeros(1, 1), 3 * one, torch.full((1, 1), math.log(3.0)))
    torch.testing.assert_close(o, torch.full((1, 1, 2), 2.5))
    torch.testing.assert_close(lse, torch.full((1, 1), math.log(4.0)))


def test_two_empty_sides_are_zeros_and_minus_infinity() -> None:
    junk, none = torch.full((3, 2, 4), math.nan), torch.full((3, 2), -math.inf)
    o, lse = merge_state(junk, none, junk, none)
    assert o.eq(0).all()
    assert lse.eq(-math.inf).all()


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_empty_side_is_ignored_whatever_it_holds(empty_first: bool) -> None:
    o, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    empty = torch.full_like(o, math.nan), torch.full_like(lse, -math.inf)
    got, got_lse = merge_state(*empty, o, lse) if empty_first else merge_state(o, lse, *empty)
    torch.testing.assert_close(got, o)
    torch.testing.assert_close(got_lse, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_merged_in_float32(dtype: torch.dtype) -> None:
    o, _, a, lse_a, b, lse_b = states(9, 4)
    lse_a, lse_b = lse_a.float(), lse_b.float()
    got, lse = merge_state(a.to(dtype), lse_a, b.to(dtype), lse_b)
    wide, _ = merge_state(a.to(dtype).float(), lse_a, b.to(dtype).float(), lse_b)
    assert got.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(got, wide.to(dtype)), "rounded once, at the end"
    torch.testing.assert_close(got.double(), o, rtol=0.02, atol=0.02)


def test_out_may_be_an_input_and_lse_a_transposed_view() -> None:
    o, lse, a, lse_a, b, lse_b = states(9, 4)
    mine = a.clone()
    got, got_lse = merge_state(mine, lse_a.T.contiguous().T, b, lse_b, out=mine)
    assert got is mine
    torch.testing.assert_close(mine, o)
    torch.testing.assert_close(got_lse, lse)
