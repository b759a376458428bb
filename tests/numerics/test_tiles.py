"""Tiles, masks and strips together say exactly what the reference says is visible."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_core.backends.torch_native import tiles as t
from attn_core.testing.reference import visible

CPU = torch.device("cpu")
NOTHING = float("-inf")


@st.composite
def sequences(draw):
    causal = draw(st.booleans())
    m = draw(st.integers(1, 60))
    n = draw(st.integers(1, m)) if causal else draw(st.integers(1, 60))
    spans, tree, at = [], None, 0
    if causal and draw(st.booleans()):
        while at < m:
            a = draw(st.integers(at, m))
            b = draw(st.integers(a, m))
            spans += [(a, b)] if b - a > 1 else []
            at = b + 1
    if causal and draw(st.booleans()):
        tree = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=n, max_size=n)))
        tree |= torch.eye(n, dtype=torch.bool)
    window, chunk = (draw(st.none() | st.integers(1, 70)) for _ in range(2))
    return t.Seq(n, m, spans, tree), t.Rules(causal=causal, window=window, chunk=chunk)


def cut(seq, rules, rows, repeat, *, unbounded=False, triangles=False, distances=False, strips=None):
    strips = strips or t.Strips(rules, repeat, CPU, distances=distances)
    found = list(t.tiles(seq, rules, rows, unbounded=unbounded, triangles=triangles, device=CPU))
    strips.fill(found, rows)
    return found


def assembled(found, seq, repeat):
    """What the tiles let through, ``(queries, keys)``, and that they cover every query once."""
    out = torch.zeros(seq.query_len, seq.kv_len, dtype=torch.bool)
    assert [q for tile in found for q in range(tile.q0, tile.q1)] == list(range(seq.query_len))
    for tile in found:
        n, m = tile.q1 - tile.q0, tile.k1 - tile.k0
        if tile.kind == "empty":
            continue
        part = torch.ones(n, m, dtype=torch.bool)
        if tile.kind == "causal":
            assert n == m
            part = part.tril()
        if tile.mask is not None:
            assert tuple(tile.mask.shape) == (1, 1, n * repeat, m)
            assert bool(((tile.mask == 0) | (tile.mask == NOTHING)).all())
            packed = (tile.mask == 0).view(n, repeat, m)
            assert bool((packed == packed[:, :1]).all())
            part = part & packed[:, 0]
        out[tile.q0 : tile.q1, tile.k0 : tile.k1] = part
    return out


def wanted(seq, rules):
    return visible(
        seq.query_len, seq.kv_len, attn_type="decoder" if rules.causal else "encoder_only",
        sliding_window=rules.window, attention_chunk=rules.chunk, spans=seq.spans, tree_mask=seq.tree,
    )  # fmt: skip


@given(sequences(), st.sampled_from([1, 4, 16]), st.sampled_from([1, 3]), st.booleans())
def test_tiles_let_through_what_is_visible(case, rows, repeat, unbounded):
    seq, rules = case
    found = cut(seq, rules, rows, repeat, unbounded=unbounded)
    assert torch.equal(assembled(found, seq, repeat), wanted(seq, rules))


@given(st.lists(sequences(), min_size=2, max_size=4), st.sampled_from([4, 16]))
def test_strips_serve_one_sequence_after_the_other(cases, rows):
    """A strip made for one sequence is reused, or outgrown, by the next."""
    rules = cases[0][1]
    strips = t.Strips(rules, 1, CPU, distances=True)
    for seq, _ in cases:
        one = t.Seq(min(seq.query_len, seq.kv_len), seq.kv_len)
        assert torch.equal(assembled(cut(one, rules, rows, 1, strips=strips), one, 1), wanted(one, rules))


@given(sequences(), st.sampled_from([1, 2]))
def test_distances_are_those_of_positions(case, repeat):
    seq, rules = case
    rows = 8 if seq.tree is None else seq.query_len
    offset = seq.kv_len - seq.query_len if rules.causal else 0
    for tile in cut(seq, rules, rows, repeat, distances=True):
        if tile.kind != "empty":
            q = torch.arange(tile.q0, tile.q1).repeat_interleave(repeat)[:, None] + offset
            want = -(torch.arange(tile.k0, tile.k1) - q).abs().float()
            assert tile.distance is not None
            assert torch.equal(tile.distance[0, 0], want)


def test_long_prompts_become_one_triangle_and_short_ones_bands():
    rules = t.Rules(causal=True)
    long = cut(t.Seq(1100, 1100), rules, 256, 1, unbounded=True, triangles=True)
    assert [x.kind for x in long] == ["causal"]
    short = cut(t.Seq(600, 600), rules, 256, 1, unbounded=True, triangles=True)
    assert [x.kind for x in short] == ["band"] * 3
    chunked = t.Rules(causal=True, chunk=1200)
    seq = t.Seq(2600, 2700)
    mixed = cut(seq, chunked, 256, 1, unbounded=True, triangles=True)
    assert {x.kind for x in mixed} == {"causal", "band"}
    assert torch.equal(assembled(mixed, seq, 1), wanted(seq, chunked))


def test_padding_rows_of_a_verify_batch_are_harmless():
    """kv length 1 with more queries than that: all but the last sit before the first key."""
    rules = t.Rules(causal=True)
    assert [(x.kind, x.q0, x.q1) for x in cut(t.Seq(4, 1), rules, 4, 1)] == [("empty", 0, 3), ("full", 3, 4)]
    tree = torch.eye(4, dtype=torch.bool)
    assert [x.kind for x in cut(t.Seq(4, 1, (), tree), rules, 4, 1)] == ["empty"]


def test_tile_sizes_depend_on_the_sequence_alone_and_bound_the_scores():
    assert t.rows_per_tile(512, 1) == t.SHORT_ROWS
    assert t.rows_per_tile(4096, 1) == t.MAX_ROWS
    for kv_len in (100, 4096, 131072):
        for planes in (1, 32, 128):
            rows = t.rows_per_tile(kv_len, planes)
            assert rows == 1 or rows * kv_len * planes <= t.MAX_SCORES
