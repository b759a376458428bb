"""The attention kernels against the float64 reference: every feature, dtype and layout that the rows claim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    SLOPES,
    Lengths,
    cross_step,
    encode_step,
    fill,
    mla_spec,
    random,
    slots,
    spec,
    step,
    table,
)  # fmt: skip
from test_mla import LENGTHS as PREFILL
from test_mla import Weights, wanted
from triton_cases import SM75, SMALL, bind, pieces, tiled

from attn_core.runtime import Batch
from attn_core.runtime.plan import Capture
from attn_core.testing.compare import differences

LENGTHS = Lengths((1, 1, 1, 5, 19), (9, 1, 61, 5, 41))
"""Decode rows and prefill rows, with and without prefix, over one block of keys and several."""

TREES = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]]).bool()

FEATURES = {
    "plain": {},
    "mha": {"num_kv_heads": 6},
    "mqa": {"num_kv_heads": 1, "num_heads": 16},
    "scale": {"scale": 0.3},
    "window": {"sliding_window": 6},
    "long window": {"sliding_window": 40},
    "chunk": {"attention_chunk": 24},
    "softcap": {"logit_softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": SLOPES},
    "bias": {"bias": True},
    "narrow v": {"head_dim": 32, "v_head_dim": 16},
    "wide v": {"v_head_dim": 48},
    "everything": {
        "sliding_window": 29, "attention_chunk": 32, "logit_softcap": 3.0, "sinks": True, "alibi_slopes": SLOPES,
        "bias": True, "v_head_dim": 24, "scale": 0.2,
    },
}  # fmt: skip


def test_an_output_with_gaps():
    """Straight to it, and merged from parts."""
    with tiled(SMALL):
        step(bind(spec(), lse=True, page_size=8), LENGTHS).check_gaps()
        step(bind(spec(), lse=True, page_size=8), Lengths((1,), (150,))).check_gaps()
        encode_step(bind(spec(attn_type="encoder_only"), lse=True), Lengths((5, 19), (5, 19))).check_gaps()
        for more in ({}, {"sparse": "dsa", "topk": 6}):
            group = bind(mla_spec(**more), form="absorbed", lse=True, page_size=4)
            step(group, Lengths((1, 1, 5), (40, 1, 20))).check_gaps()


@pytest.mark.parametrize("feature", FEATURES)
def test_decoder(feature):
    """Each feature in float32, where every mistake shows."""
    with tiled(SMALL):
        group = bind(spec(**FEATURES[feature]), lse=True, page_size=4)
        step(group, LENGTHS).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("feature", ["plain", "sinks", "everything"])
def test_half_precision(dtype, feature):
    with tiled(SMALL):
        group = bind(spec(dtype=dtype, **FEATURES[feature]), lse=True, page_size=8, kv_layout="HND")
        step(group, LENGTHS).check()


@pytest.mark.parametrize(
    ("layout", "page_size"), [("NHD", 1), ("HND", 2), ("HND", 16), ("NHD", 64), ("HND", 1024), ("NHD", 7)]
)
def test_pages(layout, page_size):
    """Smaller than a block of keys, as large, larger; in both layouts."""
    with tiled(SMALL):
        group = bind(spec(), lse=True, page_size=page_size, kv_layout=layout)
        step(group, LENGTHS).check()


@pytest.mark.parametrize("width", [24, 64, 72, 80, 96, 112, 192, 512])
def test_widths(width):
    group = bind(spec(num_heads=4, num_kv_heads=2, head_dim=width), lse=True, page_size=16)
    step(group, Lengths((1, 3), (40, 20))).check()


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 8, 12, 16])
def test_groups(group_size):
    """Tiles whose rows are not a multiple of the group, and tiles of a part of one token's heads."""
    with tiled(SMALL):
        group = bind(spec(num_heads=2 * group_size, num_kv_heads=2), lse=True, page_size=4)
        step(group, LENGTHS).check()


@pytest.mark.parametrize("tile", [(16, 32, 4), (32, 16, 4), (64, 64, 8)])
def test_tiles(tile):
    with tiled(tile):
        step(bind(spec(sliding_window=20), lse=True, page_size=4), LENGTHS).check()


@pytest.mark.parametrize("lengths", [(9, 1, 61), (200, 3, 77)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"sinks": True, "logit_softcap": 4.0}, {"sliding_window": 45}], ids=str)
@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=str)
def test_split_keys(lengths, fields, options):
    """Short pieces, so that every path through the merge runs."""
    with tiled(SMALL, fewest_keys=32):
        group = bind(spec(**fields), lse=True, page_size=8, **options)
        s = step(group, Lengths((1, 1, 1), lengths))
        assert s.plan.decode.num_merges or max(lengths) < 64
        s.check()


def test_prefill_of_few_tokens_over_a_long_context_is_split():
    with tiled(SMALL, fewest_keys=32):
        s = step(bind(spec(sinks=True), lse=True, page_size=8), Lengths((7,), (190,)))
        assert s.plan.prefill.num_merges
        s.check()


def test_deterministic_rows_do_not_depend_on_their_neighbours():
    with tiled(SMALL, fewest_keys=32):
        group = bind(spec(), lse=True, page_size=8, deterministic=True)
        s = step(group, Lengths((1, 1, 9), (150, 3, 77)))
        whole = s.run()
        for row, tokens in ((slice(0, 1), slice(0, 1)), (slice(2, 3), slice(2, 11))):
            lens = s.batch.query_lens[row], s.batch.kv_lens[row]
            alone = Batch(*lens, block_table=s.batch.block_table[row])
            got = group.forward(s.q[tokens], None, None, s.cache, group.plan(alone))
            assert torch.equal(got, whole[tokens])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("tree", [False, True])
def test_verify_rows(window, tree):
    width = 3
    with tiled(SMALL, fewest_keys=32):
        group = bind(spec(sliding_window=window), lse=True, page_size=8, verify_width=width, tree_mask=tree)
        more = {"tree_mask": TREES} if tree else {}
        step(group, Lengths((3, 3, 8), (70, 3, 21)), decode_width=width, **more).check()


def test_a_captured_plan_serves_smaller_steps_and_keeps_trees():
    """Planned for six rows of three tokens, filled with one row, without a tree and with one."""
    width, capture = 3, Capture(max_seqs=6, decode_width=3, max_kv_len=200)
    with tiled(SMALL, fewest_keys=32):
        group = bind(spec(), lse=True, page_size=8, verify_width=width, tree_mask=True, graph="decode")
        plan = group.plan(
            step(group, Lengths((3,) * 5, (90, 150, 3, 40, 7)), decode_width=width).batch, capture=capture
        )
        launched = plan.decode.num_lines
        for tree in (None, TREES[:1]):
            s = step(group, Lengths((3,), (61,)), decode_width=width, tree_mask=tree)
            s.plan = group.plan(s.batch, out=plan)
            tokens = capture.max_seqs * width
            q, k, v = (torch.cat([t, torch.zeros(tokens - width, *t.shape[1:])]) for t in (s.q, s.k, s.v))
            got, lse = group.forward(q, k, v, s.cache, plan, return_lse=True)
            want, want_lse = s.want()
            found = differences(got[:width], want, q.dtype, lse=lse[:width], want_lse=want_lse)
            assert not found, found
            assert plan.decode.num_lines == launched
            assert not s.cache.k[0].any(), "padding rows write nothing"


def test_a_bias_may_be_shared_and_strided():
    with tiled(SMALL):
        s = step(bind(spec(bias=True), lse=True, page_size=4), LENGTHS)
        for bias in (torch.randn(1, 1, 19, 61), torch.randn(5, 6, 61, 19).transpose(2, 3)):
            s.extra["bias"] = bias
            s.check()


def test_spans_attend_in_both_directions():
    with tiled(SMALL):
        group = bind(spec(bidirectional_prefix=True, sliding_window=9), lse=True, page_size=4)
        lengths = Lengths((1, 1, 12, 27, 4), (9, 1, 12, 40, 4))
        step(group, lengths, bidirectional_spans=[[], [], [(3, 9)], [(14, 19), (22, 40)], []]).check()


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 50}], ids=str)
def test_lengths_that_only_the_device_knows(fields):
    with tiled(SMALL, fewest_keys=32):
        group = bind(spec(**fields), lse=True, page_size=8, host_lengths="bounds")
        step(group, Lengths((1, 1, 7), (61, 1, 30)), bounds=[150, 90, 64]).check()


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("everything", "scale")])
def test_encoder(feature):
    with tiled(SMALL):
        group = bind(spec(attn_type="encoder_only", **FEATURES[feature]), lse=True)
        encode_step(group, Lengths((5, 33, 1, 20), (5, 33, 1, 20))).check()


@pytest.mark.parametrize("feature", ["plain", "window", "chunk", "sinks"])
def test_encoder_over_other_keys(feature):
    """Rows beyond the last key's window see nothing: zeros and -inf."""
    with tiled(SMALL):
        group = bind(spec(attn_type="encoder_only", dtype="float16", **FEATURES[feature]), lse=True)
        encode_step(group, Lengths((5, 33, 1, 30), (21, 7, 40, 2))).check()


@pytest.mark.parametrize("feature", ["plain", "mqa", "softcap", "sinks", "bias", "narrow v"])
def test_cross(feature):
    with tiled(SMALL):
        group = bind(spec(attn_type="cross", **FEATURES[feature]), lse=True, page_size=4)
        cross_step(group, Lengths((1, 1, 5, 26), (7, 43, 40, 4))).check()


QUANTISED = {"fp8_e4m3": 0.5, "fp8_e5m2": 0.25, "int8": 0.02}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", QUANTISED)
def test_narrow_caches(dtype, kv_dtype):
    """With one scale, and with one per head."""
    size = QUANTISED[kv_dtype]
    with tiled(SMALL, fewest_keys=32):
        group = bind(spec(dtype=dtype), lse=True, page_size=8, kv_cache_dtype=kv_dtype)
        per_head = torch.tensor([1.0, 0.5, 0.2]) * size
        for scales in ((size, 1.5 * size), (per_head, per_head.flip(0))):
            step(group, Lengths((1, 5), (41, 20)), scales=scales).check(ulps=3.0)  # probabilities are rounded too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "query"), [("MLA", "packed"), ("MLA_SPLIT", "split")])
def test_absorbed_mla(dtype, layout, query):
    with tiled(SMALL, fewest_keys=32):
        s = mla_spec(dtype=dtype, num_heads=20)
        group = bind(s, form="absorbed", mla_query=query, lse=True, page_size=8, kv_layout=layout)
        step(group, Lengths((1, 1, 5), (70, 1, 20))).check()


@pytest.mark.parametrize("fields", [{"logit_softcap": 2.0}, {"sinks": True, "sliding_window": 20}], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, "fp8_e4m3"])
def test_absorbed_mla_with_all_it_claims(fields, kv_dtype):
    with tiled(SMALL):
        group = bind(mla_spec(**fields), form="absorbed", lse=True, page_size=4, kv_cache_dtype=kv_dtype)
        step(group, Lengths((1, 1, 5), (40, 1, 20)), scales=(0.5, 7.0) if kv_dtype else (1.0, 1.0)).check()


def test_absorbed_mla_in_deepseeks_sizes():
    s = mla_spec(num_heads=16, nope_dim=128, rope_dim=64, head_dim=192, v_head_dim=128, latent_dim=512)
    step(bind(s, form="absorbed", lse=True, page_size=16), Lengths((1,), (40,))).check()


HALVES = {
    "plain": {},
    "split": {"mla_query": "split", "kv_layout": "MLA_SPLIT"},
    "float16": {"dtype": "float16"},
    "e5m2": {"kv_cache_dtype": "fp8_e5m2"},
    "softcap, sinks": {"logit_softcap": 2.0, "sinks": True},
    "sparse": {"sparse": "dsa", "topk": 21},
}


@pytest.mark.parametrize("name", HALVES)
def test_a_latent_in_halves(name):
    """Turing's way, in pieces that are merged."""
    given = dict(HALVES[name])
    options = {n: given.pop(n) for n in ("mla_query", "kv_layout", "kv_cache_dtype") if n in given}
    s = mla_spec(num_heads=5, nope_dim=16, rope_dim=64, head_dim=80, v_head_dim=16, latent_dim=512, **given)
    with pieces(16):
        group = bind(s, form="absorbed", device=SM75, lse=True, page_size=8, **options)
        made = step(group, Lengths((1, 3), (70, 20)), scales=(0.5, 0.5) if "kv_cache_dtype" in options else (1.0, 1.0))
        made.check(ulps=3.0)


@pytest.mark.parametrize("kind", ["absorbed", "split", "heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse(kind, dtype):
    more = {"lse": True, "page_size": 4}
    with tiled(SMALL):
        if kind == "heads":
            group = bind(spec(dtype=dtype, sparse="dsa", topk=21), kv_layout="HND", **more)
        else:
            layout, query = ("MLA", "packed") if kind == "absorbed" else ("MLA_SPLIT", "split")
            made = mla_spec(dtype=dtype, sparse="dsa", topk=21, num_heads=20)
            group = bind(made, form="absorbed", mla_query=query, kv_layout=layout, **more)
        s = step(group, Lengths((1, 1, 5, 4), (36, 1, 5, 30)))
        s.check()
        s.extra["indices"][:, -1] = 36  # after every query's own position, so not seen
        s.check()


def test_verify_rows_of_sparse_attention():
    with tiled(SMALL):
        made = mla_spec(sparse="dsa", topk=6)
        group = bind(made, form="absorbed", lse=True, page_size=4, verify_width=3, host_lengths="bounds")
        step(group, Lengths((3, 3, 9), (30, 3, 17)), decode_width=3, bounds=[33, 8, 17]).check()


def test_materialised_mla_with_context():
    """New tokens, then chunks of cached context; a row without context sees empty chunks."""
    with tiled(SMALL):
        s = mla_spec(v_head_dim=24)
        group = bind(s, form="materialised", lse=True, page_size=4)
        g = torch.Generator().manual_seed(0)
        block_table, pages = table(PREFILL.kv, 4, g)
        cache = group.new_kv_cache(pages)
        fill(cache, g)
        where = slots(block_table, PREFILL.query, PREFILL.kv, 4)
        batch = Batch(list(PREFILL.query), list(PREFILL.kv), block_table=block_table, slot_mapping=where)
        tokens, weights = sum(PREFILL.query), Weights(s, torch.float32)
        latent, rope = (random(g, torch.float32, tokens, w) for w in (s.latent_dim, s.rope_dim))
        q = random(g, torch.float32, tokens, s.num_heads, s.head_dim)
        plan = group.plan(batch)
        group.write_kv(latent, rope, cache, plan)
        new = weights.expand(latent, rope)
        got, lse = group.prefill_with_context(q, *new, cache, plan, weights.expand, chunk_tokens=24, return_lse=True)
        want, want_lse = wanted(group, batch, cache, weights, q, new)
        found = differences(got, want, q.dtype, lse=lse, want_lse=want_lse)
        assert not found, found


@pytest.mark.slow
@settings(max_examples=150)
@given(st.data())
def test_anything_the_rows_accept(data):
    """Random combinations of features, sizes and lengths."""
    _anything(data)


@settings(max_examples=12)
@given(st.data())
def test_some_of_what_the_rows_accept(data):
    _anything(data)


def _anything(data):
    draw = data.draw
    kv_heads, group_size = draw(st.integers(1, 2)), draw(st.integers(1, 16))
    heads = kv_heads * group_size
    fields = {
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": draw(st.sampled_from([16, 24, 40])),
        "v_head_dim": draw(st.sampled_from([16, 24, 32])), "dtype": draw(st.sampled_from(list(DTYPES))),
        "sliding_window": draw(st.none() | st.integers(1, 40)), "attention_chunk": draw(st.none() | st.integers(1, 40)),
        "logit_softcap": draw(st.none() | st.floats(0.5, 30.0)), "sinks": draw(st.booleans()),
        "bias": draw(st.booleans()), "scale": draw(st.none() | st.floats(0.05, 0.6)),
        "alibi_slopes": tuple(2.0 ** -(i % 8 + 1) for i in range(heads)) if draw(st.booleans()) else None,
    }  # fmt: skip
    width = draw(st.integers(1, 4))
    options = {
        "page_size": draw(st.sampled_from([1, 2, 5, 8, 32])), "kv_layout": draw(st.sampled_from(["NHD", "HND"])),
        "verify_width": width, "deterministic": draw(st.booleans()),
    }  # fmt: skip
    decode = draw(st.lists(st.integers(width, 90), max_size=2))
    rest = [
        (n, n + extra) for n, extra in draw(st.lists(st.tuples(st.integers(5, 25), st.integers(0, 40)), max_size=2))
    ]
    lengths = Lengths([width] * len(decode) + [n for n, _ in rest], decode + [m for _, m in rest])
    if lengths.query:
        with tiled(SMALL, fewest_keys=32):
            made = bind(spec(**fields), lse=True, **options)
            s = step(made, lengths, seed=draw(st.integers(0, 99)), decode_width=width)
            s.check(lse=draw(st.booleans()), ulps=3.0)  # probabilities are rounded to the dtype too
