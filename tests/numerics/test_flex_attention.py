"""flex_attention against the float64 reference, and the blocks it visits against what is visible."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import MIXED, SLOPES, Lengths, bind, cross_step, encode_step, spec, step

from attn_core.backends.flex_attention import kernel, rules
from attn_core.backends.torch_native.tiles import Rules

BACKEND = "flex_attention"
EVERYTHING = {
    "sliding_window": 9, "attention_chunk": 16, "logit_softcap": 3.0, "sinks": True, "alibi_slopes": SLOPES,
    "v_head_dim": 32, "scale": 0.2,
}  # fmt: skip
FEATURES = {
    "plain": {},
    "mha": {"num_kv_heads": 6},
    "window": {"sliding_window": 6},
    "chunk": {"attention_chunk": 8},
    "softcap": {"logit_softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": SLOPES},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("feature", FEATURES)
def test_decoder(feature):
    step(bind(spec(**FEATURES[feature]), BACKEND, lse=True, page_size=4)).check()


def test_an_output_with_gaps():
    step(bind(spec(), BACKEND, lse=True, page_size=4)).check_gaps()
    group = bind(spec(attn_type="encoder_only"), BACKEND, lse=True)
    encode_step(group, Lengths((5, 9, 1, 20), (5, 9, 1, 20))).check_gaps()
    group = bind(spec(attn_type="cross"), BACKEND, lse=True, page_size=4)
    cross_step(group, Lengths((1, 1, 5, 6), (7, 3, 20, 4))).check_gaps()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_over_heads_first_pages(dtype):
    group = bind(spec(dtype=dtype, **EVERYTHING), BACKEND, lse=True, page_size=16, kv_layout="HND")
    step(group).check()


def test_verify_rows():
    group = bind(spec(sliding_window=6), BACKEND, lse=True, page_size=4, verify_width=3)
    step(group, Lengths((3, 3, 9), (30, 3, 17)), decode_width=3).check()


@pytest.mark.parametrize("feature", ["plain", "window", "everything"])
def test_encoder(feature):
    group = bind(spec(attn_type="encoder_only", **FEATURES[feature]), BACKEND, lse=True)
    encode_step(group, Lengths((5, 9, 1, 20), (5, 9, 1, 20))).check()
    encode_step(group, Lengths((5, 9, 1, 20), (7, 3, 2, 4))).check()


def test_cross():
    group = bind(spec(attn_type="cross", sinks=True), BACKEND, lse=True, page_size=4)
    cross_step(group, Lengths((1, 1, 5, 6), (7, 3, 20, 4))).check()


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_head_dims(width):
    step(bind(spec(head_dim=width), BACKEND, lse=True, page_size=4), Lengths((1, 5), (9, 12))).check()


def test_a_refilled_plan_follows_the_step_and_compiles_nothing_new():
    group = bind(spec(sliding_window=6), BACKEND, page_size=4)
    kept = step(group).plan
    for seed, lengths in enumerate((Lengths((1, 9), (70, 33)), MIXED, Lengths((1, 30), (80, 60)))):
        s = step(group, lengths, seed=seed)
        s.plan = group.plan(s.batch, out=kept)
        s.check(lse=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            step(group, Lengths((1, 20 + seed), (90 + seed, 50)), seed=seed).check(lse=False)


@given(st.data())
def test_blocks_cover_what_is_visible_and_full_ones_are_seen_whole(data):
    draw = data.draw
    causal = draw(st.booleans())
    m = draw(st.integers(1, 700))
    n = draw(st.integers(1, m if causal else 700))
    made = Rules(
        causal=causal, window=draw(st.none() | st.integers(1, 400)), chunk=draw(st.none() | st.integers(1, 400))
    )
    position = m - n if causal else 0
    start = max(0, min(made.keys(position, m)[0], m - 1))
    end = max(start, made.keys(position + n - 1, m)[1])
    if end > start:
        one = torch.tensor([position - start]), torch.tensor([start])
        sees = rules.mask_mod(made, *one)
        blocks = rules.block_mask(made, position, n, start, end, sees, torch.device("cpu"))
        b = torch.zeros((), dtype=torch.long)
        seen = sees(b, b, torch.arange(n)[:, None], torch.arange(end - start))
        want = made.visible(position, position + n, start, end, torch.device("cpu"))
        assert torch.equal(seen.expand_as(want), want)
        assert torch.equal(_unblocked(blocks, n, end - start) & want, want)
        full = _listed(blocks.full_kv_num_blocks, blocks.full_kv_indices, n, end - start)
        assert torch.equal(full & want, full)
        partial = _listed(blocks.kv_num_blocks, blocks.kv_indices, n, end - start)
        assert not bool((partial & full).any())


def _unblocked(blocks, n, m):
    lists = ((blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices))
    return _listed(*lists[0], n, m) | _listed(*lists[1], n, m)


def _listed(counts, indices, n, m):
    out = torch.zeros(n, m, dtype=torch.bool)
    for i, count in enumerate(counts[0, 0].tolist()):
        for j in indices[0, 0, i, :count].tolist():
            out[i * rules.BLOCK : (i + 1) * rules.BLOCK, j * rules.BLOCK : (j + 1) * rules.BLOCK] = True
    return out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled(dtype, monkeypatch):
    """As on accelerators, as far as a CPU can: its compiled kernel returns no log-sum-exp."""
    monkeypatch.setattr(kernel, "COMPILER", {})
    for fields in ({}, {"sliding_window": 6, "attention_chunk": 16, "alibi_slopes": SLOPES, "logit_softcap": 3.0}):
        step(bind(spec(dtype=dtype, **fields), BACKEND, page_size=4)).check(lse=False)
        group = bind(spec(dtype=dtype, attn_type="encoder_only", **fields), BACKEND)
        encode_step(group, Lengths((5, 9, 1, 20), (7, 3, 2, 4))).check(lse=False)
