"""Rules of single families where a whole model file would hide which rule was at work."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from attn_core.errors import BadInputError
from attn_core.models.alibi import slopes
from attn_core.models.layers import collect
from attn_core.models.registry import FAMILIES, READERS, WRAPPERS, type_of_architecture
from attn_core.spec import AttentionSpec, LinearSpec, ModelSpec

DATA = Path(__file__).parents[2] / "data" / "models"
SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 8}


def read(kind: str, **changes: Any) -> ModelSpec:
    """A small model of this type; ``kind`` may be an architecture's name too."""
    who = {"architectures": [kind]} if kind[0].isupper() else {"model_type": kind}
    return ModelSpec.from_hf_config({**who, **SIZES, "dtype": "bfloat16", **changes})


def file(name: str, drop: tuple[str, ...] = (), **changes: Any) -> ModelSpec:
    data = {**json.loads((DATA / f"{name}.json").read_text()), **changes}
    return ModelSpec.from_hf_config({k: v for k, v in data.items() if k not in drop})


def layers(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: g.layers for name, g in model.groups.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "llama"),
        ("LlamaForCausalLMEagle3", "llama"),
        ("LlamaForSequenceClassification", "llama"),
        ("LlamaFooForCausalLM", None),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
        ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("GPT2LMHeadModel", "gpt2"),
        ("GPTNeoForCausalLM", None),
        ("GPTNeoXForCausalLM", "gpt_neox"),
        ("MiMoV2FlashForCausalLM", "mimo_v2_flash"),
        ("MiMoV2MTP", "mimo_v2_mtp"),
        ("ModernBertDecoderForCausalLM", "modernbert-decoder"),
        ("XLMRobertaForMaskedLM", "xlm-roberta"),
        ("T5EncoderModel", "t5"),
        ("T5GemmaForConditionalGeneration", None),
        ("Phi4MMForCausalLM", None),
        ("", None),
    ],
)
def test_architecture_names_begin_with_their_model_type(name: str, kind: str | None) -> None:
    assert type_of_architecture(name) == kind


def test_each_type_has_one_reader() -> None:
    types = [kind for family in FAMILIES for kind in family.types.split()]
    assert len(types) == len(set(types)) == len(READERS)
    assert not set(WRAPPERS) & set(types)


def test_architecture_decides_before_model_type_and_either_will_do() -> None:
    assert read("GptOssForCausalLM", model_type="llama", sliding_window=None).groups["full"].sinks
    assert not read("LlamaForCausalLM", model_type="gpt_oss", layer_types=["full_attention"] * 8).groups["full"].sinks
    named, typed = read("GptOssForCausalLM"), read("gpt_oss")
    assert named.groups == typed.groups
    assert (named.architecture, typed.architecture) == ("GptOssForCausalLM", "gpt_oss")


def test_a_generic_sink_flag_counts_in_every_family() -> None:
    for kind in ("llama", "gemma2", "qwen3_next", "llama4", "mimo_v2_flash"):
        flag = {"layer_types": ["full_attention"] * 8} if kind == "mimo_v2_flash" else {}
        for on in (True, False):
            model = read(kind, learnable_sink=on, **flag)
            assert {g.sinks for g in model.groups.values() if isinstance(g, AttentionSpec)} == {on}, kind


@pytest.mark.parametrize("swa", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_mimo_sinks_belong_to_the_layers_whose_flag_is_set(swa: bool, full: bool) -> None:
    model = file("mimo-v2-flash", add_swa_attention_sink_bias=swa, add_full_attention_sink_bias=full)
    assert {n: g.sinks for n, g in model.groups.items()} == {"full": full, "sliding": swa}
    draft = file(
        "mimo-v2-flash",
        architectures=["MiMoV2MTP"],
        add_swa_attention_sink_bias=swa,
        add_full_attention_sink_bias=full,
    )
    assert {n: (g.sinks, g.num_kv_heads, g.sliding_window, g.layers) for n, g in draft.groups.items()} == {
        "sliding": (swa or full, 8, 129, (0,))
    }


def test_mimo_window_counts_the_token_itself() -> None:
    assert file("mimo-v2-flash", sliding_window_size=64).groups["sliding"].sliding_window == 65
    assert file("mimo-v2-flash", drop=("sliding_window_size",)).groups["sliding"].sliding_window == 128
    absent = ("add_swa_attention_sink_bias", "add_full_attention_sink_bias")
    assert not any(g.sinks for g in file("mimo-v2-flash", drop=absent).groups.values())


@pytest.mark.parametrize(
    ("rope", "mscale"),
    [
        ({"type": "yarn", "factor": 40, "mscale_all_dim": 0.5}, 0.05 * math.log(40) + 1),
        ({"rope_type": "yarn", "factor": 40, "mscale_all_dim": 1.0}, 0.1 * math.log(40) + 1),
        ({"rope_type": "yarn", "factor": 40, "mscale": 1.0}, 1.0),
        ({"rope_type": "yarn", "factor": 40, "mscale_all_dim": 0}, 1.0),
        ({"rope_type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"rope_type": "default", "factor": 40, "mscale_all_dim": 1.0}, 1.0),
        ({}, 1.0),
        (None, 1.0),
    ],
)
def test_yarn_squares_its_mscale_into_the_mla_scale(rope: dict[str, Any] | None, mscale: float) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        spec = file("deepseek-v3", **{"rope_scaling": None, field: rope}).groups["full"]
        assert isinstance(spec, AttentionSpec)
        assert spec.softmax_scale == pytest.approx(192**-0.5 * mscale**2, rel=1e-12)
        assert spec.custom_scale == (mscale != 1.0)


def test_mla_ignores_the_stated_kv_heads() -> None:
    assert file("deepseek-v3", num_key_value_heads=1).groups == file("deepseek-v3").groups


def test_some_layers_may_be_dense_in_a_sparse_model() -> None:
    kinds = ["full_attention", "indexed_attention", "deepseek_sparse_attention"]
    groups = file("deepseek-v3.2", num_hidden_layers=3, layer_types=kinds).groups
    assert {n: (g.sparse, g.topk, g.layers) for n, g in groups.items()} == {
        "full": ("none", None, (0,)),
        "indexed": ("dsa", 2048, (1, 2)),
    }


def test_kimi_lists_count_from_one_and_must_name_every_layer() -> None:
    lists = {"full_attn_layers": [2], "kda_layers": [1, 3], "num_heads": 4, "head_dim": 64}
    model = file("kimi-linear-48b-a3b", num_hidden_layers=3, linear_attn_config=lists)
    assert layers(model) == {"linear": (0, 2), "full": (1,)}
    for wrong in ([2, 3], [], [4]):
        with pytest.raises(BadInputError, match=r"1\.\.3"):
            file("kimi-linear-48b-a3b", num_hidden_layers=3, linear_attn_config={**lists, "full_attn_layers": wrong})


def test_nemotron_pattern_and_block_types_say_the_same() -> None:
    word = {"M": "mamba", "-": "mlp", "*": "attention", "E": "moe"}
    for pattern in ("M-*EM", "*", "MM*-"):
        by_letters = file("nemotron-h-8b", hybrid_override_pattern=pattern)
        types = [word[c] for c in pattern]
        by_types = file("nemotron-h-8b", drop=("hybrid_override_pattern",), layers_block_type=types)
        assert by_letters.groups == by_types.groups
        assert layers(by_letters).get("full") == tuple(i for i, c in enumerate(pattern) if c == "*")
    with pytest.raises(BadInputError, match="has X"):
        file("nemotron-h-8b", hybrid_override_pattern="M*X")


def test_mamba_hybrids_hold_attention_by_list_by_type_or_beside_the_mamba_branch() -> None:
    mamba = {"mamba_n_heads": 16, "mamba_d_state": 32}
    assert layers(read("bamba", attn_layer_indices=[2, 5], **mamba)) == {"linear": (0, 1, 3, 4, 6, 7), "full": (2, 5)}
    types = ["mamba"] * 7 + ["attention"]
    granite = read("granitemoehybrid", layer_types=types, attention_multiplier=0.0078125, **mamba)
    assert layers(granite) == {"linear": tuple(range(7)), "full": (7,)}
    assert granite.groups["full"].scale == 0.0078125
    falcon = read("falcon_h1", mamba_d_ssm=256, **mamba)
    assert layers(falcon) == {"full": tuple(range(8)), "linear": tuple(range(8))}
    assert falcon.groups["linear"].head_dim == 16
    assert granite.groups["linear"] == LinearSpec(
        kind="mamba2", num_heads=16, head_dim=64, state_dim=32, conv_kernel=4, dtype="bfloat16", layers=tuple(range(7))
    )


def test_llama4_layers_with_rotation_are_chunked() -> None:
    by_list = read("llama4_text", no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1])
    assert layers(by_list) == {"chunked": (0, 2, 3, 5, 6, 7), "full": (1, 4)}
    assert by_list.groups["chunked"].attention_chunk == 8192
    assert layers(read("llama4_text")) == {"chunked": (0, 1, 2, 4, 5, 6), "full": (3, 7)}
    assert layers(read("llama4_text", attention_chunk_size=None)) == {"full": tuple(range(8))}


@pytest.mark.parametrize(
    ("kind", "fields", "sliding"),
    [
        ("mistral", {}, range(8)),
        ("mistral", {"sliding_window": None}, ()),
        ("gemma2", {}, (0, 2, 4, 6)),
        ("gemma3_text", {"sliding_window_pattern": 3}, (0, 1, 3, 4, 6, 7)),
        ("gemma4_text", {"sliding_window_pattern": 3}, (0, 1, 3, 4, 6)),
        ("cohere2", {}, (0, 1, 2, 4, 5, 6)),
        ("cwm", {}, (1, 2, 3, 5, 6, 7)),
        ("exaone4", {"sliding_window_pattern": "LLG"}, (0, 1, 3, 4, 6)),
        ("qwen2", {}, ()),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 6}, (6, 7)),
        ("mellum", {}, ()),
    ],
)
def test_windowed_layers_without_layer_types(kind: str, fields: dict[str, Any], sliding: Any) -> None:
    found = layers(read(kind, **fields))
    assert found.get("sliding", ()) == tuple(sliding)
    assert found.get("full", ()) == tuple(i for i in range(8) if i not in sliding)


@pytest.mark.parametrize("kind", ["gemma4_text", "mimo_v2_flash", "qwen3_next"])
def test_layer_types_of_another_family_are_refused(kind: str) -> None:
    fields = {"linear_num_key_heads": None} if kind == "qwen3_next" else {}
    for odd in ("linear_attention", "conv") if kind != "qwen3_next" else ("linear_attention", "chunked_attention"):
        with pytest.raises(BadInputError, match="layer"):
            read(kind, layer_types=["full_attention"] * 7 + [odd], **fields)


def test_sink_models_with_a_window_must_say_which_layers_have_it() -> None:
    with pytest.raises(BadInputError, match="flint: missing layer_types"):
        read("flint")


def test_baichuan_rotates_at_7b_and_has_slopes_at_13b() -> None:
    assert read("baichuan", hidden_size=4096, num_attention_heads=32).groups["full"].alibi_slopes is None
    big = read("baichuan", hidden_size=5120, num_attention_heads=40).groups["full"].alibi_slopes
    assert big == slopes(40)


def test_slopes_are_those_of_the_paper() -> None:
    assert slopes(8) == tuple(2.0**-k for k in range(1, 9))
    assert slopes(16)[:2] == pytest.approx((2**-0.5, 2**-1.0))
    assert slopes(12) == pytest.approx((*slopes(8), *slopes(16)[:8:2]))
    assert slopes(1) == (2.0**-8,)


def test_falcon_kv_heads() -> None:
    assert read("falcon").groups["full"].num_kv_heads == 1
    assert read("falcon", multi_query=False).groups["full"].num_kv_heads == 8
    assert read("falcon", new_decoder_architecture=True).groups["full"].num_kv_heads == 2
    assert read("falcon").groups["full"].alibi_slopes is None


def test_mpt_nests_its_attention() -> None:
    group = read("mpt", attn_config={"alibi": False, "softmax_scale": 0.25, "kv_n_heads": 4}).groups["full"]
    assert (group.alibi_slopes, group.scale, group.num_kv_heads) == (None, 0.25, 4)
    assert read("mpt", attn_config={"attn_type": "multiquery_attention"}).groups["full"].num_kv_heads == 1
    with pytest.raises(BadInputError, match="prefix_lm"):
        read("mpt", attn_config={"prefix_lm": True})


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("DeepseekV3ForCausalLMNextN", "deepseek-v3", 1),
        ("DeepseekV32ForCausalLMNextN", "deepseek-v3.2", 1),
        ("Qwen3NextForCausalLMMTP", "qwen3-next-80b-a3b", 1),
        ("Qwen3_5MoeForConditionalGenerationMTP", "qwen3.5-35b-a3b", 1),
        ("Glm4MoeForCausalLMNextN", "glm-4.5", 1),
    ],
)
def test_draft_layers_are_the_targets_full_attention(name: str, target: str, expected: int) -> None:
    draft, whole = file(target, architectures=[name]), file(target)
    assert layers(draft) == {"full": tuple(range(expected))}
    assert draft.groups["full"].facts() == whole.groups["full"].facts()
    joined = whole.with_draft(draft)
    assert "draft.full" in joined.groups


def test_one_stack_of_an_encoder_decoder() -> None:
    assert list(file("t5-small", architectures=["T5EncoderModel"]).groups) == ["encoder"]
    assert list(file("whisper-large-v3", architectures=["WhisperForAudioClassification"]).groups) == ["encoder"]
    assert list(file("whisper-large-v3", is_encoder_decoder=False).groups) == ["full"]
    deep = file("t5-small", num_decoder_layers=2)
    assert {n: len(g.layers) for n, g in deep.groups.items()} == {"encoder": 6, "full": 2, "cross": 2}
    uneven = file("whisper-large-v3", decoder_attention_heads=10, decoder_layers=4)
    assert [(g.num_heads, g.head_dim, len(g.layers)) for g in uneven.groups.values()] == [
        (20, 64, 32), (10, 128, 4), (10, 128, 4),
    ]  # fmt: skip


def test_bert_kinds() -> None:
    assert layers(read("bert")) == {"encoder": tuple(range(8))}
    assert read("bert", is_decoder=True).groups["full"].causal
    assert read("mpnet").groups["encoder"].bias
    for fields in (
        {"position_embedding_type": "relative_key_query"},
        {"is_decoder": True, "add_cross_attention": True},
    ):
        with pytest.raises(BadInputError, match="not supported"):
            read("bert", **fields)


def test_wrappers_are_read_by_their_language_model_with_its_class_defaults() -> None:
    llava = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "float16",
        "text_config": {"model_type": "llama", "num_key_value_heads": 4},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16},
    }
    model = ModelSpec.from_hf_config(llava)
    assert not model.notes
    full, tower = model.groups["full"], model.groups["vision"]
    assert (full.num_heads, full.num_kv_heads, full.head_dim, len(full.layers)) == (32, 4, 128, 32)
    assert (tower.num_heads, tower.head_dim, len(tower.layers), tower.dtype) == (16, 64, 12, "float16")
    with pytest.raises(BadInputError, match="missing num_attention_heads, hidden_size, num_hidden_layers"):
        ModelSpec.from_hf_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


def test_language_model_inside_a_thinker() -> None:
    text = {"model_type": "qwen2_5_omni_text", **SIZES}
    model = ModelSpec.from_hf_config(
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": text, "torch_dtype": "float16"}}
    )
    assert model.groups["full"] == AttentionSpec(
        num_heads=8, num_kv_heads=2, head_dim=64, dtype="float16", layers=tuple(range(8))
    )


def test_qwen2_vl_states_the_tower_width_as_embed_dim() -> None:
    tower = {"embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "depth": 3, "model_type": "qwen2_vl"}
    assert read("qwen2_vl", vision_config=tower).groups["vision"].head_dim == 80


def test_dual_chunks_overlap_by_the_local_part() -> None:
    config = {"chunk_size": 32, "local_size": 8, "sparse_attention_enabled": True}
    assert read("qwen2", dual_chunk_attention_config=config).groups["full"].dual_chunk == 24
    assert read("qwen2", dual_chunk_attention_config={}).groups["full"].dual_chunk == 8192 - 1024
    assert read("qwen2", dual_chunk_attention_config=None).groups["full"].dual_chunk is None
    with pytest.raises(BadInputError, match="local_size=32"):
        read("qwen2", dual_chunk_attention_config={"chunk_size": 32, "local_size": 32})
    with pytest.raises(BadInputError, match="read without dual chunk attention"):
        read("t5", dual_chunk_attention_config={"chunk_size": 32})


def test_layers_with_own_sizes_become_groups_of_their_own() -> None:
    a, b = (AttentionSpec(num_heads=8, head_dim=d, dtype="float16") for d in (64, 128))
    groups = collect([(0, "full", a), (1, "full", b), (2, "full", a), (3, "sliding", b)])
    assert {n: (g.head_dim, g.layers) for n, g in groups.items()} == {
        "full": (64, (0, 2)),
        "full_2": (128, (1,)),
        "sliding": (128, (3,)),
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.json")))
def test_shipped_files_are_the_given_facts(name: str) -> None:
    root = Path(os.environ.get("ATTN_CORE_SHARED", Path(__file__).parents[4] / "shared")) / "models" / f"{name}.json"
    if not root.is_file():
        pytest.skip("the facts are not here to compare with")
    assert json.loads(root.read_text()) == json.loads((DATA / f"{name}.json").read_text())
