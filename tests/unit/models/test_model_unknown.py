"""Architectures we do not know: read with a note, or refused; no field that changes attention is passed over."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.errors import BadInputError
from attn_core.models.view import SPELLINGS, STATED
from attn_core.spec import AttentionSpec, LinearSpec, ModelSpec

DATA = Path(__file__).parents[2] / "data" / "models"
NEW: dict[str, Any] = {
    "architectures": ["BrandNewForCausalLM"],
    "model_type": "brand_new",
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "num_hidden_layers": 6,
    "dtype": "bfloat16",
}


def read(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({k: v for k, v in {**NEW, **changes}.items() if v != "absent"})


def refusal(**changes: Any) -> str:
    with pytest.raises(BadInputError) as error:
        read(**changes)
    return str(error.value)


def test_common_fields_give_a_spec_that_says_how_it_was_read() -> None:
    model = read()
    assert dict(model.groups) == {
        "full": AttentionSpec(num_heads=24, num_kv_heads=8, head_dim=64, dtype="bfloat16", layers=tuple(range(6)))
    }
    (note,) = model.notes
    assert note.startswith("architecture BrandNewForCausalLM is not known; read as a dense causal decoder from ")
    assert "num_key_value_heads" in note


def test_missing_fields_are_all_named_with_the_architecture() -> None:
    text = refusal(num_attention_heads="absent", num_hidden_layers=None)
    assert "BrandNewForCausalLM: missing num_attention_heads, num_hidden_layers" in text
    assert "missing hidden_size" in refusal(hidden_size="absent")
    assert read(hidden_size="absent", head_dim=80).groups["full"].head_dim == 80
    assert "no head_dim" in refusal(hidden_size=1000)


HONOURED: list[tuple[dict[str, Any], dict[str, dict[str, Any]]]] = [
    ({"attn_logit_softcapping": 30.0}, {"full": {"logit_softcap": 30.0}}),
    ({"query_pre_attn_scalar": 100}, {"full": {"scale": 0.1}}),
    ({"attention_multiplier": 0.02}, {"full": {"scale": 0.02}}),
    ({"scale_attn_weights": False}, {"full": {"scale": 1.0}}),
    ({"learnable_sink": True}, {"full": {"sinks": True}}),
    ({"learnable_sink": True, "sliding_window": 64}, {"sliding": {"sinks": True, "sliding_window": 64}}),
    ({"learnable_sink": False}, {"full": {"sinks": False}}),
    ({"sliding_window": 128}, {"sliding": {"sliding_window": 128, "layers": (0, 1, 2, 3, 4, 5)}}),
    ({"sliding_window": 128, "use_sliding_window": False}, {"full": {"sliding_window": None}}),
    (
        {"sliding_window": 128, "sliding_window_pattern": 3},
        {"sliding": {"layers": (0, 1, 3, 4)}, "full": {"layers": (2, 5), "sliding_window": None}},
    ),
    (
        {"sliding_window": 128, "sliding_window_pattern": "LLLG"},
        {"sliding": {"layers": (0, 1, 2, 4)}, "full": {"layers": (3, 5)}},
    ),
    (
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4},
        {"full": {"layers": (0, 1, 2, 3)}, "sliding": {"layers": (4, 5)}},
    ),
    (
        {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"] * 3},
        {"full": {"layers": (0, 2, 4)}, "sliding": {"layers": (1, 3, 5)}},
    ),
    ({"attention_chunk_size": 512}, {"chunked": {"attention_chunk": 512}}),
    ({"dual_chunk_attention_config": {"chunk_size": 512, "local_size": 64}}, {"full": {"dual_chunk": 448}}),
    ({"num_key_value_heads": "absent"}, {"full": {"num_kv_heads": 24}}),
    ({"num_key_value_heads": "absent", "multi_query": True}, {"full": {"num_kv_heads": 1}}),
    ({"v_head_dim": 48}, {"full": {"v_head_dim": 48}}),
    ({"use_bidirectional_attention": "vision"}, {"full": {"bidirectional_prefix": True, "attn_type": "decoder"}}),
    ({"is_causal": False}, {"full": {"attn_type": "encoder_only"}}),
    ({"architectures": ["BrandNewForMaskedLM"]}, {"encoder": {"attn_type": "encoder_only"}}),
    ({"architectures": ["NewBidirectionalModel"]}, {"full": {"attn_type": "encoder_only"}}),
    (
        {"kv_lora_rank": 256, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "v_head_dim": 64, "index_topk": 512},
        {"full": {"kind": "mla", "head_dim": 128, "latent_dim": 256, "sparse": "dsa", "topk": 512, "num_kv_heads": 24}},
    ),
    ({"alibi": True, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64},
     {"full": {"alibi_slopes": tuple(2.0**-k for k in range(1, 9))}}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), HONOURED, ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_fields_that_change_attention_are_honoured(fields: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    model = read(**fields)
    assert list(model.groups) == list(expected)
    for name, facts in expected.items():
        for field, value in facts.items():
            assert getattr(model.groups[name], field) == value, (name, field)
    assert any("not known" in note for note in model.notes)


REFUSED: list[dict[str, Any]] = [
    {"attention_sink_size": 4},
    {"cross_attention_layers": [3]},
    {"add_cross_attention": True},
    {"is_encoder_decoder": True},
    {"alibi_bias_max": 16},
    {"position_embedding_type": "alibi"},
    {"position_embedding_type": "relative_key"},
    {"relative_attention_num_buckets": 32},
    {"use_cla": True},
    {"num_kv_shared_layers": 2},
    {"local_attention": 128},
    {"attention_window": [512] * 6},
    {"window_size": 256},
    {"attn_soft_cap": 30.0},
    {"sparse_attention_config": {"block": 64}},
    {"block_configs": [{}]},
    {"per_layer_config": {"0": {"head_dim": 32}}},
    {"prefix_lm": True},
    {"softmax_scale": 0.5},
    {"scale_attn_by_inverse_layer_idx": True},
    {"hybrid_override_pattern": "M*M*M*"},
    {"linear_attn_config": {"num_heads": 4}},
    {"mamba_d_state": 64},
    {"ssm_state_size": 64},
    {"swa_num_key_value_heads": 2},
    {"index_topk": 2048},
    {"kv_lora_rank": 512},
    {"layer_types": ["full_attention"] * 5},
    {"layer_types": ["full_attention"] * 5 + ["banded_attention"]},
    {"layer_types": ["sliding_attention"] * 6},
    {"layer_types": ["chunked_attention"] * 6},
    {"layer_types": ["linear_attention"] * 6},
    {"layer_types": ["indexed_attention"] * 6},
    {"sliding_window": 64, "attention_chunk_size": 128},
    {"sliding_window": 64, "no_rope_layers": [1, 0, 1, 0, 1, 0]},
    {"sliding_window": 64, "sliding_window_pattern": "LXG"},
    {"sliding_window": [64, None]},
    {"sliding_window": True},
    {"query_pre_attn_scalar": 256, "attention_multiplier": 0.1},
    {"learnable_sink": "yes"},
    {"num_key_value_heads": 5},
    {"sliding_window": 64, "is_causal": False},
    {"sliding_window": 64, "use_bidirectional_attention": True},
    {"sliding_window": 64, "architectures": ["BrandNewBertModel"]},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: ",".join(f"{k}={v}"[:40] for k, v in fields.items()))
def test_fields_that_cannot_be_honoured_are_refused(fields: dict[str, Any]) -> None:
    text = refusal(**fields)
    named = {"num_key_value_heads": "num_kv_heads", "kv_lora_rank": "qk_nope_head_dim", "layer_types": "layer"}
    words = (*(named.get(field, field) for field in fields), "encoder-decoder", "indexed_attention", "linear layers")
    assert any(word in text for word in words), text


def test_switched_off_fields_are_no_reason_to_refuse() -> None:
    off: dict[str, Any] = {
        "sliding_window": None,
        "attention_sink_size": 0,
        "cross_attention_layers": [],
        "alibi": False,
        "hybrid_override_pattern": "",
        "per_layer_config": {},
        "is_encoder_decoder": False,
    }
    other: dict[str, Any] = {
        "final_logit_softcapping": 30.0,
        "router_logit_softcapping": 5.0,
        "mamba_ssm_dtype": "float32",
        "mlp_layer_types": ["dense"] * 6,
        "rope_theta": 1e4,
        "attention_bias": True,
        "attention_dropout": 0.1,
    }
    assert read(**off, **other).groups == read().groups


def test_known_type_under_an_unknown_name_is_read_by_its_type_and_says_so() -> None:
    for path in DATA.glob("*.json"):
        data = json.loads(path.read_text())
        known = ModelSpec.from_hf_config(data)
        renamed = ModelSpec.from_hf_config({**data, "architectures": ["BrandNewThing"]})
        assert renamed.groups == known.groups, path.stem
        assert any("BrandNewThing is not known" in note for note in renamed.notes), path.stem


def test_unknown_wrapper_around_a_known_language_model() -> None:
    text = {"model_type": "gemma2", "hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4}
    model = ModelSpec.from_hf_config({"architectures": ["NewVLM"], "model_type": "new_vlm", "text_config": text})
    assert model.groups["sliding"].logit_softcap == 50.0
    assert "NewVLM is not known; its language model is read as gemma2" in model.notes[0]
    with pytest.raises(BadInputError, match="cross_attention_layers"):
        ModelSpec.from_hf_config(
            {"architectures": ["NewVLM"], "text_config": text, "cross_attention_layers": [1], "model_type": "new_vlm"}
        )


def test_towers_we_do_not_know_are_read_plainly_or_not_at_all() -> None:
    tower = {"model_type": "new_vit", "hidden_size": 640, "num_attention_heads": 10, "num_hidden_layers": 3}
    model = read(vision_config=tower)
    assert model.groups["vision"] == AttentionSpec(
        num_heads=10, head_dim=64, dtype="bfloat16", attn_type="encoder_only", layers=(0, 1, 2)
    )
    assert any("vision tower new_vit is not known" in note for note in model.notes)
    for broken in ({**tower, "window_size": 14}, {"model_type": "new_vit", "hidden_size": 640}):
        model = read(vision_config=broken)
        assert list(model.groups) == ["full"]
        assert any("not read" in note for note in model.notes)
    assert any("audio tower" in note for note in read(audio_config={"num_mel_bins": 80}).notes)


SPELLED = {
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "head_dim": ("head_dim", "kv_channels", "d_head"),
}


@given(st.data())
@settings(max_examples=100)
def test_random_dense_configs_give_consistent_specs(data: st.DataObject) -> None:
    draw = data.draw
    kv, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    heads, width, layers = kv * group, draw(st.sampled_from([32, 40, 64, 72, 128, 256])), draw(st.integers(1, 50))
    window = draw(st.none() | st.integers(1, 8192))
    pattern = draw(st.none() | st.integers(1, 7)) if window else None
    fields: dict[str, Any] = {
        "num_attention_heads": heads, "num_key_value_heads": kv, "num_hidden_layers": layers,
        "head_dim": draw(st.sampled_from([width, None])), "hidden_size": heads * width,
    }  # fmt: skip
    config: dict[str, Any] = {draw(st.sampled_from(SPELLED[name])): value for name, value in fields.items()}
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32", None]))
    config |= {
        "architectures": [draw(st.sampled_from(["AlphaForCausalLM", "BetaModel"]))],
        draw(st.sampled_from(["dtype", "torch_dtype"])): dtype,
        "sliding_window": window,
        "sliding_window_pattern": pattern,
    }
    model = ModelSpec.from_hf_config(config)
    assert model == ModelSpec.from_hf_config(json.loads(json.dumps(config)))
    assert sorted(i for g in model.groups.values() for i in g.layers) == list(range(layers))
    assert len(model.notes) == 1 + (dtype is None) + (window is not None and set(model.groups) == {"sliding"})
    for i in range(layers):
        g = model.groups[model.group_of(i)]
        assert isinstance(g, AttentionSpec)
        assert (g.num_heads, g.num_kv_heads, g.head_dims) == (heads, kv, (width, width))
        assert g.dtype == (dtype or "bfloat16")
        assert (g.custom_scale, g.sinks, g.logit_softcap) == (False, False, None)
        assert g.sliding_window == (None if pattern and (i + 1) % pattern == 0 else window)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
SIZES = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 7}
FIELDS = (
    *SPELLINGS, *STATED, "alibi", "attention_chunk_size", "attn_config", "attn_layer_indices", "fullatt_block_indexes",
    "is_encoder_decoder", "layers_block_type", "linear_attn_config", "mamba_d_ssm", "max_window_layers",
    "no_rope_layers", "num_kv_shared_layers", "per_layer_config", "text_config", "use_bidirectional_attention",
    "v_head_dim", "vision_config",
)  # fmt: skip
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))} | {
    kind: {"model_type": kind, **SIZES}
    for kind in ("gemma4_text", "gemma3n_text", "mpt", "falcon", "bamba", "falcon_h1", "qwen2", "mpnet", "bart", "new")
}


@given(st.sampled_from(sorted(CONFIGS)), st.data())
@settings(max_examples=250)
def test_any_value_in_any_field_is_read_or_refused(name: str, data: st.DataObject) -> None:
    config = json.loads(json.dumps(CONFIGS[name]))
    where = config
    nested = [key for key in ("text_config", "vision_config", "linear_attn_config") if key in config]
    if nested and data.draw(st.booleans()):
        where = config[data.draw(st.sampled_from(nested))]
    where[data.draw(st.sampled_from(sorted({*where, *FIELDS})))] = data.draw(JSON)
    with contextlib.suppress(BadInputError):
        model = ModelSpec.from_hf_config(config)
        assert all(isinstance(g, AttentionSpec | LinearSpec) for g in model.groups.values())
