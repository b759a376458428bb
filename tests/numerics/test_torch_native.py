"""torch_native against the float64 reference: every feature, dtype and layout that its rows claim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, MIXED, SLOPES, Lengths, bind, cross_step, encode_step, mla_spec, spec, step

from attn_core.backends.torch_native import scores, setup, steps

FEATURES = {
    "plain": {},
    "mha": {"num_kv_heads": 6},
    "mqa": {"num_kv_heads": 1},
    "scale": {"scale": 0.3},
    "window": {"sliding_window": 6},
    "chunk": {"attention_chunk": 8},
    "softcap": {"logit_softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": SLOPES},
    "bias": {"bias": True},
    "narrow v": {"v_head_dim": 8},
    "wide v": {"v_head_dim": 24},
    "odd width": {"head_dim": 20},
    "everything": {
        "sliding_window": 9, "attention_chunk": 16, "logit_softcap": 3.0, "sinks": True, "alibi_slopes": SLOPES,
        "bias": True, "v_head_dim": 24, "scale": 0.2,
    },
    "everything but softcap": {
        "sliding_window": 9, "attention_chunk": 16, "sinks": True, "alibi_slopes": SLOPES, "bias": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("layout", "page_size"), [("NHD", 16), ("HND", 4), ("NHD", 1), ("HND", 7)])
def test_decoder(dtype, feature, layout, page_size):
    group = bind(spec(dtype=dtype, **FEATURES[feature]), lse=True, page_size=page_size, kv_layout=layout)
    step(group).check()


@pytest.mark.parametrize(
    "lengths", [MIXED, Lengths((1,), (40,)), Lengths((1, 1, 1), (4, 9, 2)), Lengths((7, 7), (7, 7))]
)
def test_an_output_with_gaps(lengths):
    step(bind(spec(dtype="bfloat16"), lse=True, page_size=4), lengths).check_gaps()
    rows = Lengths(lengths.kv, lengths.kv)
    encode_step(bind(spec(attn_type="encoder_only"), lse=True), rows).check_gaps()
    step(bind(mla_spec(), form="absorbed", lse=True, page_size=4), lengths).check_gaps()
    step(bind(mla_spec(sparse="dsa", topk=6), lse=True, page_size=4), lengths).check_gaps()


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_either_way_to_take_scores_does_everything(feature, written_out, monkeypatch):
    """Other devices have no fused kernel: the same groups through the other one."""
    if written_out:
        monkeypatch.setattr(setup, "HAS_FUSED", False)
    group = bind(spec(**FEATURES[feature]), lse=True, page_size=4)
    step(group, Lengths((1, 1, 40, 3), (9, 50, 40, 23))).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", [f for f in FEATURES if f != "everything"])
@pytest.mark.parametrize("kv_lens", [(5, 9, 1, 20), (7, 3, 2, 4)], ids=["self", "ragged"])
def test_encoder(dtype, feature, kv_lens):
    """Also with key lengths of their own: rows beyond the last key's window see nothing."""
    group = bind(spec(dtype=dtype, attn_type="encoder_only", **FEATURES[feature]), lse=True)
    encode_step(group, Lengths((5, 9, 1, 20), kv_lens)).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ["plain", "mqa", "softcap", "sinks", "bias", "narrow v", "wide v"])
def test_cross(dtype, feature):
    group = bind(spec(dtype=dtype, attn_type="cross", **FEATURES[feature]), lse=True, page_size=4)
    cross_step(group, Lengths((1, 1, 5, 6), (7, 3, 20, 4))).check()


SPANS = [[], [], [(3, 9)], [(2, 6), (8, 11)], [(5, 9), (16, 30)], []]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ["plain", "window", "chunk", "softcap", "sinks", "alibi", "bias"])
def test_spans_attend_in_both_directions(dtype, feature):
    group = bind(spec(dtype=dtype, bidirectional_prefix=True, **FEATURES[feature]), lse=True, page_size=4)
    lengths = Lengths((1, 1, 1, 12, 17, 4), (9, 1, 37, 12, 30, 4))
    step(group, lengths, bidirectional_spans=SPANS).check()


QUANTISED = {"fp8_e4m3": 0.5, "fp8_e5m2": 0.25, "fp8_e4m3fnuz": 0.5, "int8": 0.02}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [*QUANTISED, *DTYPES])
@pytest.mark.parametrize(("layout", "feature"), [("NHD", "plain"), ("HND", "narrow v"), ("HND", "softcap")])
def test_cache_dtypes(dtype, kv_dtype, layout, feature):
    """Scores and values come from what the cache holds, rounded as it is, even if the new k and v are at hand."""
    s = spec(dtype=dtype, **FEATURES[feature])
    group = bind(s, lse=True, page_size=4, kv_cache_dtype=kv_dtype, kv_layout=layout)
    size = QUANTISED.get(kv_dtype)
    step(group, scales=(1.0, 1.0) if size is None else (size, 1.5 * size)).check()
    if size is not None:
        per_head = torch.tensor([1.0, 0.5, 0.2]) * size
        step(group, scales=(per_head, per_head.flip(0))).check()


@pytest.mark.parametrize("feature", ["plain", "mqa", "window", "alibi", "bias", "sinks", "narrow v"])
def test_long_contexts_are_read_in_parts(feature, monkeypatch):
    monkeypatch.setattr(steps, "PART_BYTES", 1 << 12)
    group = bind(spec(**FEATURES[feature]), lse=True, page_size=4)
    s = step(group, Lengths((1, 1, 1), (190, 5, 63)))
    fetches = [len(x.fetches) for x in s.plan.decode.sequences]
    assert (fetches[1] == 1 and fetches[0] > 1) or feature == "window"
    s.check()


def test_a_bias_may_be_shared_and_may_hide_all_keys():
    group = bind(spec(bias=True, num_kv_heads=3), lse=True, page_size=4)
    s = step(group)
    s.extra["bias"] = torch.randn(1, 1, 7, 37)
    s.check()
    s.extra["bias"][0, 0, 0] = float("-inf")  # the first query of every sequence
    s.check()


def test_context_of_4k_in_all_dtypes():
    for dtype in DTYPES:
        s = spec(dtype=dtype, num_heads=4, num_kv_heads=2, head_dim=32)
        step(bind(s, lse=True, page_size=16), Lengths((1, 1, 70), (4096, 1029, 4000))).check()
        windowed = spec(dtype=dtype, num_heads=4, num_kv_heads=2, head_dim=32, sliding_window=1000, logit_softcap=30.0)
        step(bind(windowed, lse=True, page_size=16), Lengths((1, 1, 70), (4096, 1029, 4000))).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [513, 1100])
def test_long_prompts(dtype, tokens):
    """Beyond the sizes at which k and v are compacted, and at which the kernel's own causality takes over."""
    group = bind(spec(dtype=dtype, num_heads=4, num_kv_heads=2), lse=True, page_size=16)
    step(group, Lengths((1, tokens, 40), (77, tokens, 700))).check()


@settings(max_examples=120)
@given(st.data())
def test_anything_the_rows_accept(data):
    """Random combinations of features, sizes and lengths."""
    draw = data.draw
    kv_heads, group_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = kv_heads * group_size
    fields = {
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": draw(st.sampled_from([16, 24, 40])),
        "v_head_dim": draw(st.sampled_from([16, 24, 32])), "dtype": draw(st.sampled_from(list(DTYPES))),
        "sliding_window": draw(st.none() | st.integers(1, 40)), "attention_chunk": draw(st.none() | st.integers(1, 40)),
        "logit_softcap": draw(st.none() | st.floats(0.5, 30.0)), "sinks": draw(st.booleans()),
        "bias": draw(st.booleans()), "scale": draw(st.none() | st.floats(0.05, 0.6)),
        "alibi_slopes": tuple(2.0 ** -(i + 1) for i in range(heads)) if draw(st.booleans()) else None,
    }  # fmt: skip
    width = draw(st.integers(1, 4))
    options = {
        "page_size": draw(st.sampled_from([1, 3, 8])), "kv_layout": draw(st.sampled_from(["NHD", "HND"])),
        "verify_width": width,
    }  # fmt: skip
    decode = draw(st.lists(st.integers(width, 60), max_size=3))
    rest = [
        (n, n + extra) for n, extra in draw(st.lists(st.tuples(st.integers(5, 30), st.integers(0, 40)), max_size=3))
    ]
    lengths = Lengths([width] * len(decode) + [n for n, _ in rest], decode + [m for _, m in rest])
    if lengths.query:
        s = step(bind(spec(**fields), lse=True, **options), lengths, seed=draw(st.integers(0, 99)), decode_width=width)
        s.check(lse=draw(st.booleans()))


def test_the_fused_kernel_is_what_runs_on_cpus():
    assert scores.HAS_FUSED, "torch lost _scaled_dot_product_flash_attention_for_cpu: decode and prefill are slow now"
