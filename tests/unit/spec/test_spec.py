"""Specs refuse what contradicts itself, in one clear sentence, and survive a round trip through JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core import (
    ANY,
    AttentionSpec,
    BackendSpec,
    BadInputError,
    Constraint,
    Device,
    EngineOptions,
    LinearSpec,
    ModelSpec,
    MultipleOf,
    OneOf,
    PlatformSpec,
    Requirement,
)
from attn_core.errors import DeclarationError
from attn_core.spec.fields import FEATURES, FIELDS, RELEVANT

SPEC = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
MLA = {
    "num_heads": 16, "head_dim": 192, "v_head_dim": 128, "dtype": "bfloat16", "kind": "mla",
    "latent_dim": 512, "rope_dim": 64, "nope_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 0}, "num_heads=0 must be a positive integer"),
        ({"num_heads": -8}, "num_heads=-8 must be a positive integer"),
        ({"num_heads": 30}, "num_heads=30 is not a multiple of num_kv_heads=8"),
        ({"num_heads": True}, "num_heads=True must be a positive integer"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"head_dim": 64.0}, "head_dim=64.0"),
        ({"dtype": "float8"}, "dtype='float8' is not supported; allowed are float32, bfloat16, float16"),
        ({"dtype": "blfoat16"}, "did you mean 'bfloat16'"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"attention_chunk": -4}, "attention_chunk=-4"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"attn_type": "encoder"}, "did you mean 'encoder_only'"),
        ({"kind": "mla"}, "needs latent_dim, rope_dim and nope_dim"),
        ({"sparse": "dsa"}, "needs topk"),
        ({"sinks": 1}, "sinks=1 must be True or False"),
        ({"alibi_slopes": (0.5, 0.25)}, "2 alibi_slopes for 32 heads"),
        ({"layers": (1, 1)}, "distinct"),
    ],
)
def test_attention_spec_refuses_contradictions(change, says):
    with pytest.raises(BadInputError) as e:
        AttentionSpec(**{**SPEC, **change})
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_mla_widths_must_add_up():
    with pytest.raises(BadInputError, match=r"nope_dim \+ rope_dim"):
        AttentionSpec(**{**MLA, "head_dim": 128})


def test_the_scale_is_that_of_the_models_own_width():
    assert AttentionSpec(num_heads=12, head_dim=32, dtype="float32").softmax_scale == 32**-0.5
    mla = AttentionSpec(**MLA)
    assert mla.softmax_scale == 192**-0.5
    assert not mla.custom_scale
    assert AttentionSpec(**{**MLA, "scale": 0.2}).custom_scale


def test_mla_is_seen_through_its_form():
    mla = AttentionSpec(**MLA)
    absorbed, materialised = mla.facts("absorbed"), mla.facts("materialised")
    assert (absorbed["head_dims"], absorbed["num_kv_heads"], absorbed["group_size"]) == ((576, 512), 1, 16)
    assert (materialised["head_dims"], materialised["num_kv_heads"]) == ((192, 128), 16)
    assert absorbed["unequal_v"]
    assert materialised["unequal_v"]


@pytest.mark.parametrize(
    ("heads", "kv", "ranks", "want"), [(32, 8, 4, (8, 2)), (32, 8, 16, (2, 1)), (16, 1, 8, (2, 1))]
)
def test_sharding(heads, kv, ranks, want):
    s = AttentionSpec(num_heads=heads, num_kv_heads=kv, head_dim=64, dtype="float16").sharded(ranks)
    assert (s.num_heads, s.num_kv_heads) == want


@pytest.mark.parametrize(("heads", "kv", "ranks"), [(30, 6, 4), (24, 6, 4), (32, 8, 12)])
def test_indivisible_heads_are_bad_input(heads, kv, ranks):
    with pytest.raises(BadInputError, match="tensor_parallel"):
        AttentionSpec(num_heads=heads, num_kv_heads=kv, head_dim=64, dtype="float16").sharded(ranks)


SPECS = st.builds(
    AttentionSpec,
    num_heads=st.sampled_from([8, 16]),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    head_dim=st.sampled_from([32, 72, 128]),
    v_head_dim=st.sampled_from([0, 64]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    attn_type=st.sampled_from(["decoder", "encoder_only", "cross"]),
    sliding_window=st.none() | st.integers(1, 4096),
    logit_softcap=st.none() | st.floats(1, 100),
    scale=st.none() | st.floats(0.01, 1),
    sinks=st.booleans(),
    bias=st.booleans(),
    layers=st.lists(st.integers(0, 90), unique=True).map(tuple),
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), SPECS, min_size=1, max_size=3))
def test_models_survive_json(groups):
    model = ModelSpec(groups={**groups, "lin": LinearSpec(kind="gdn", num_heads=4, head_dim=64, dtype="bfloat16")})
    assert ModelSpec.from_json(json.loads(json.dumps(model.to_json()))) == model


def test_a_draft_joins_under_its_own_names():
    model = ModelSpec(groups={"full": AttentionSpec(**SPEC)}, architecture="T")
    draft = ModelSpec(
        groups={"full": AttentionSpec(**{**SPEC, "num_heads": 8}), "shared": AttentionSpec(**SPEC, kv_from="full")}
    )
    joined = model.with_draft(draft)
    assert list(joined.groups) == ["full", "draft.full", "draft.shared"]
    assert joined.groups["draft.shared"].kv_from == "draft.full"


def test_layers_find_their_group():
    model = ModelSpec(
        groups={
            "vision": AttentionSpec(num_heads=4, head_dim=64, dtype="float16", attn_type="encoder_only", layers=(0, 1)),
            "cross": AttentionSpec(**SPEC, attn_type="cross", layers=(1, 2)),
            "full": AttentionSpec(**SPEC, layers=(0, 1)),
        }
    )
    assert [model.group_of(i) for i in (0, 1, 2)] == ["full", "full", "cross"]
    with pytest.raises(BadInputError, match="layer 3"):
        model.group_of(3)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"page_size": 0}, "page_size=0"),
        ({"page_size": -16}, "page_size=-16"),
        ({"kv_cache_dtype": "fp8"}, "did you mean"),
        ({"graph": "whole"}, "graph='whole' is not one of full, decode, piecewise, none"),
        ({"uniform": "yes"}, "uniform"),
        ({"tensor_parallel": 0}, "tensor_parallel=0"),
        ({"world_size": 3, "tensor_parallel": 2}, "not a multiple"),
        ({"backend": 3}, "backend=3"),
        ({"pagesize": 16}, "did you mean 'page_size'"),
        ({"deterministic": "yes"}, "deterministic"),
    ],
)
def test_options_refuse_nonsense(option, says):
    with pytest.raises(BadInputError) as e:
        EngineOptions.of(**option)
    assert says in str(e.value)


def test_options_know_their_pins():
    o = EngineOptions(page_size=16, tensor_parallel=4, deny=["b", "a"])
    assert o.pins() == {"page_size": 16, "tensor_parallel": 4, "deny": ("a", "b")}
    assert o.without("page_size").pins() == {"tensor_parallel": 4, "deny": ("a", "b")}
    assert o.without("tensor_parallel").world_size == 1
    assert EngineOptions(kv_cache_dtype="auto") == EngineOptions()
    assert EngineOptions.from_json(json.loads(json.dumps(o.to_json()))) == o


ROW = {"backend": "b", "role": "decode", "platform": "cuda", "accepts": {"dtype": "bfloat16", "head_dim": [64, 128]}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"role": "decoding"}, "did you mean 'decode'"),
        ({"accepts": {"dtype": "bfloat16"}}, "head_dim or head_dims"),
        ({"accepts": {"head_dim": 64}}, "states dtype"),
        ({"accepts": {**ROW["accepts"], "sink": True}}, "unknown field 'sink'; did you mean 'sinks'"),
        ({"accepts": {**ROW["accepts"], "sinks": OneOf(1)}}, "accepts 1"),
        ({"accepts": {**ROW["accepts"], "kv_cache_dtype": "fp8"}}, "accepts 'fp8'"),
        ({"accepts": {**ROW["accepts"], "dtype": MultipleOf(2)}}, "not an integer"),
        ({"accepts": {**ROW["accepts"], "page_size": OneOf()}}, "accepts nothing"),
        ({"tier": "SUPER"}, "tier='SUPER'"),
        ({"bind": "nowhere"}, "package.module:function"),
        ({"requires": "not a requirement!"}, "not a requirement"),
        ({"pads": {"v_head_dim"}}, "pads"),
        ({"form": "absorbd"}, "form='absorbd'"),
        ({"rank": 1.5}, "rank=1.5"),
    ],
)
def test_declarations_are_validated(change, says):
    with pytest.raises(DeclarationError) as e:
        BackendSpec(**{**ROW, **change})
    assert says in str(e.value)


def test_constraints_are_validated():
    Constraint(name="c", when={"prefill": "fa3"}, then={"decode": "fa3"}, because="one kernel")
    with pytest.raises(DeclarationError, match="did you mean 'page_size'"):
        Constraint(name="c", when={"pagesize": 1}, then={"decode": "fa3"}, because="x")
    with pytest.raises(DeclarationError, match="claim of one backend"):
        Constraint(name="c", when={"appends": True}, then={"decode": "fa3"}, because="x")
    with pytest.raises(DeclarationError, match="then"):
        Constraint(name="c", when={}, then={}, because="x")


def test_requirements_compare_versions():
    r = Requirement("Flashinfer_Python>=0.7,<0.8")
    assert r.name == "flashinfer-python"
    assert r.admits("0.7.2.post1")
    assert r.admits("0.7.3.dev5")
    assert not r.admits("0.8")


def test_every_feature_is_refused_unless_claimed():
    """A feature's default holds its plain value only, so a backend that says nothing refuses it."""
    assert {"sinks", "sliding_window", "logit_softcap", "lse", "deterministic", "alibi", "bias", "sparse"} <= set(
        FEATURES
    )
    for name in FEATURES:
        f = FIELDS[name]
        if f.type is bool:
            assert f.default == OneOf(False), name
        assert f.doc
        assert any(name in fields for fields in RELEVANT.values()), name


def test_devices_and_platforms_are_validated():
    with pytest.raises(BadInputError, match="without ':'"):
        Device(platform="cuda:0", arch="sm_90")
    with pytest.raises(BadInputError, match="total_memory=-1"):
        Device(platform="cuda", arch="sm_90", total_memory=-1)
    d = Device(platform="cuda", arch="sm_90", isa={"wgmma"}, versions={"cuda": "13.0"})
    assert Device.from_json(json.loads(json.dumps(d.to_json()))) == d
    with pytest.raises(BadInputError, match="alias 'x' points to unknown arch"):
        PlatformSpec(name="cuda", torch_device="cuda", known=(d,), aliases={"x": "sm_1"})


def test_a_model_can_be_given_as_fields():
    assert ModelSpec.of(**SPEC).groups["full"] == AttentionSpec(**SPEC)
    with pytest.raises(BadInputError, match="did you mean 'head_dim'"):
        ModelSpec.of(num_heads=8, headdim=64, dtype="float16")
    with pytest.raises(BadInputError, match="needs head_dim"):
        ModelSpec.of(num_heads=8, dtype="float16")
    assert ANY.is_any
