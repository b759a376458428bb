"""Masks of transformers as ragged lengths: what padding and windows make is read exactly, one other bit is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_core import AttnCoreError
from attn_core.integrations.hf_mask import read_padding


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor, int | None]:
    """(mask, real tokens, window) of a padded batch."""
    length = draw(st.integers(2, 12))
    lens = draw(st.lists(st.integers(0, length), min_size=1, max_size=4))
    left = draw(st.lists(st.booleans(), min_size=len(lens), max_size=len(lens)))
    window = draw(st.none() | st.integers(1, 14))
    place = torch.arange(length)
    keep = torch.stack([place >= length - n if on_left else place < n for n, on_left in zip(lens, left)])
    near = (place[:, None] - place).abs() < (window or length)
    return keep[:, None, None] & near, keep, window


@given(masks())
def test_lengths_and_places_are_those_of_the_padding(case):
    mask, keep, window = case
    got = read_padding(mask, *keep.shape, window)
    assert got.lens == tuple(n for n in keep.sum(1).tolist() if n)
    index = torch.arange(keep.numel()) if got.index is None else got.index
    assert index.tolist() == keep.flatten().nonzero().flatten().tolist()
    assert (got.index is None) == bool(keep.all())


@given(masks(), st.data())
def test_any_other_bit_in_a_real_tokens_row_is_refused(case, data):
    mask, keep, window = case
    real = keep.nonzero().tolist()
    if not real:
        return
    sequence, query = data.draw(st.sampled_from(real))
    key = data.draw(st.integers(0, keep.shape[1] - 1))
    mask = mask.clone()
    mask[sequence, 0, query, key] ^= True
    lone = keep[sequence].sum() == 1 or window == 1
    if lone and key == query:  # a token that saw only itself, hidden from itself: just what padding looks like
        return
    with pytest.raises(AttnCoreError, match="more than padding"):
        read_padding(mask, *keep.shape, window)


def test_one_row_for_all_queries_is_read_without_expanding_it():
    keep = torch.tensor([[True, True, False], [True, False, True]])
    expanded = keep[:, None, None].expand(-1, 1, 3, 3)
    assert read_padding(expanded[:1], 2, 3, None).lens == (2, 2)
    with pytest.raises(AttnCoreError, match="more than padding"):
        read_padding(expanded, 2, 3, None)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3, 4), (2, 2, 3, 3), (3, 1, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(AttnCoreError, match="shape"):
        read_padding(torch.ones(shape, dtype=torch.bool), 2, 3, None)


def test_numbers_are_refused():
    with pytest.raises(AttnCoreError, match=r"torch\.int64"):
        read_padding(torch.ones(1, 1, 2, 2, dtype=torch.int64), 1, 2, None)
