"""Masks of transformers as ragged lengths: read exactly, or refused. What is read is played back as kernels see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_core import AttentionSpec, AttnCoreError
from attn_core.integrations.hf_mask import Rows, read_mask

PLAIN = AttentionSpec(num_heads=1, head_dim=16, dtype="float32")
KINDS = ("encoder_only", "decoder", "cross")


def played_back(rows: Rows, spec: AttentionSpec, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(mask, real queries) that kernels make of the lengths: positions count from each sequence's first key."""
    mask, real = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.bool)
    for s, q, n, a, m in zip(rows.sequences, rows.first_query, rows.query_lens, rows.first_key, rows.kv_lens):
        position = torch.arange(n)[:, None] + (m - n if spec.causal else 0)
        key = torch.arange(m)
        seen = key <= position if spec.causal else torch.ones(n, m, dtype=torch.bool)
        if spec.sliding_window is not None:
            seen = seen & ((position - key).abs() < spec.sliding_window)
        if spec.attention_chunk is not None:
            seen = seen & (position // spec.attention_chunk == key // spec.attention_chunk)
        mask[s, q : q + n, a : a + m] = seen
        real[s, q : q + n] = True
    return mask, real


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, AttentionSpec]:
    """A mask ``(batch, 1, queries, keys)`` as transformers makes it, for one kind of layer and one kind of cache."""
    kind = draw(st.sampled_from(KINDS))
    queries = draw(st.integers(1, 8))
    before = draw(st.integers(0, 8)) if kind == "decoder" else 0
    total = draw(st.integers(1, 9)) if kind == "cross" else before + queries
    place = torch.arange(total)
    lens = draw(st.lists(st.integers(0, total), min_size=1, max_size=4))
    left = draw(st.lists(st.booleans(), min_size=len(lens), max_size=len(lens)))
    keep = torch.stack([place >= total - n if on_left else place < n for n, on_left in zip(lens, left)])
    window = chunk = None
    position = torch.arange(before, before + queries)[:, None] if kind != "cross" else torch.zeros(queries, 1)
    seen = keep[:, None].expand(-1, queries, -1)
    if kind == "decoder":
        seen = seen & (place <= position)
        rule = draw(st.sampled_from(("none", "window", "chunk")))
        size = draw(st.integers(1, 10))
        if rule == "window":
            window, seen = size, seen & (position - place < size)
        elif rule == "chunk":  # chunks begin at the first token, after padding on the left
            chunk, origin = size, torch.tensor([total - n if on_left else 0 for n, on_left in zip(lens, left)])
            origin = origin[:, None, None]
            chunk_of = [torch.div(x - origin, size, rounding_mode="floor") for x in (position, place)]
            seen = seen & (chunk_of[0] == chunk_of[1])
        cropped = draw(st.integers(0, min(before, max(before - size + 1, 0)))) if rule != "none" else 0
        slack = draw(st.integers(0, 3))
        seen = torch.nn.functional.pad(seen[:, :, cropped:], (0, slack))  # a sliding cache; a static one
    elif kind == "encoder_only":
        window = draw(st.none() | st.integers(1, 10))
        seen = seen & ((position - place).abs() < (window or total))
    return seen[:, None], replace(PLAIN, attn_type=kind, sliding_window=window, attention_chunk=chunk)


def read(mask: Tensor, spec: AttentionSpec) -> tuple[Rows, tuple[int, int, int]]:
    shape = (mask.shape[0], mask.shape[2], mask.shape[3])
    return read_mask(mask, spec, *shape), shape


@given(masks())
def test_what_transformers_makes_is_read_exactly(case):
    mask, spec = case
    rows, shape = read(mask, spec)
    got, real = played_back(rows, spec, shape)
    assert torch.equal(got & real[:, :, None], mask[:, 0] & real[:, :, None])
    lone = mask[:, 0].any(2) & ~real  # rows of padding may see something, but nobody sees them
    if spec.attn_type == "decoder" and bool(real.any()):
        start = next(m - n - q + a for q, n, a, m in
                     zip(rows.first_query, rows.query_lens, rows.first_key, rows.kv_lens))  # fmt: skip
        own = mask[:, 0].any(1)[:, start : start + shape[1]]
        assert not bool((own & lone).any())
    places = rows.places(*shape[:2], torch.device("cpu"))
    flat = torch.arange(shape[0] * shape[1]) if places is None else places
    assert sorted(flat.tolist()) == real.flatten().nonzero().flatten().tolist()
    assert (rows.query_lens and rows.query_lens[0] == 1) or 1 not in rows.query_lens


@given(masks(), st.data())
def test_another_bit_is_read_as_it_stands_or_refused(case, data):
    mask, spec = case
    before, shape = read(mask, spec)
    real = played_back(before, spec, shape)[1].nonzero().tolist()
    if not real:
        return
    sequence, query = data.draw(st.sampled_from(real))
    key = data.draw(st.integers(0, shape[2] - 1))
    mask = mask.clone()
    mask[sequence, 0, query, key] ^= True
    try:
        rows, _ = read(mask, spec)
    except AttnCoreError:
        return
    got, real = played_back(rows, spec, shape)
    assert torch.equal(got & real[:, :, None], mask[:, 0] & real[:, :, None])
    if not bool(real[sequence, query]):  # then it is a token that nobody sees: just what padding looks like
        assert not bool(mask[sequence, 0, query].any()) or not bool(mask[sequence, 0, :, key].any())


def test_without_a_mask():
    decoder, encoder = PLAIN, replace(PLAIN, attn_type="encoder_only")
    assert read_mask(None, decoder, 2, 5, 5).kv_lens == (5, 5)
    assert read_mask(None, decoder, 2, 1, 9).kv_lens == (9, 9)
    assert read_mask(None, decoder, 2, 5, 9).kv_lens == (5, 5)  # a static cache, just begun
    assert read_mask(None, replace(PLAIN, attn_type="cross"), 2, 5, 9).kv_lens == (9, 9)
    for spec, queries, keys in ((decoder, 5, 4), (encoder, 5, 9)):
        with pytest.raises(AttnCoreError, match=f"{queries} queries over {keys} keys"):
            read_mask(None, spec, 2, queries, keys)


def test_one_row_for_all_queries_is_read_without_expanding_it():
    keep = torch.tensor([[True, True, False], [True, False, True]])
    expanded, encoder = keep[:, None, None].expand(-1, 1, 3, 3), replace(PLAIN, attn_type="encoder_only")
    assert read_mask(expanded[:1], encoder, 2, 3, 3).query_lens == (2, 2)
    with pytest.raises(AttnCoreError, match="more than padding"):
        read_mask(expanded, encoder, 2, 3, 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3, 4), (2, 2, 3, 3), (3, 1, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(AttnCoreError, match="shape"):
        read_mask(torch.ones(shape, dtype=torch.bool), PLAIN, 2, 3, 3)


def test_numbers_are_refused():
    with pytest.raises(AttnCoreError, match=r"torch\.int64"):
        read_mask(torch.ones(1, 1, 2, 2, dtype=torch.int64), PLAIN, 1, 2, 2)
