"""Our reading against transformers: its modelling code run without weights, and its config classes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.23")

import torch
from hf_oracle import FAR, Call, record
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attn_core.models.defaults import DEFAULTS
from attn_core.models.registry import READERS
from attn_core.models.view import SPELLINGS, STATED, View
from attn_core.models.vision import TOWERS
from attn_core.spec import AttentionSpec, LinearSpec, ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")

DATA = Path(__file__).parents[2] / "data" / "models"
FILES = sorted(path.stem for path in DATA.glob("*.json"))
SEQ2SEQ = {"t5-small": {"decoder_input_ids": (1, 5)}, "whisper-large-v3": {"decoder_input_ids": (1, 5)}}
DEEP = ("deepseek-v3", "deepseek-v3.2", "glm-4.5", "glm-5", "kimi-k2-instruct", "qwen3-30b-a3b")
"""Deep models whose layers are all alike are cut before they run, which saves most of their time."""


def config_of(name: str, **changes: Any) -> Any:
    """transformers' config object of a file. It has no class for Kimi K2, whose code is DeepSeek V3's."""
    data = {**json.loads((DATA / f"{name}.json").read_text()), **changes}
    kind = data.pop("model_type")
    return AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(kind, kind), **data)


@pytest.mark.parametrize("name", FILES)
def test_config_object_reads_like_its_file(name: str) -> None:
    ours = ModelSpec.from_hf_config(DATA / f"{name}.json")
    theirs = ModelSpec.from_hf_config(config_of(name))
    assert theirs.groups == ours.groups
    assert theirs.architecture == ours.architecture


def check(call: Call, spec: AttentionSpec, where: object, *, scaled_before: bool = False) -> None:
    """One recorded call against one group."""
    heads = spec.num_heads if spec.kind == "mla" else spec.num_kv_heads
    assert (call.num_heads, call.num_kv_heads) == (spec.num_heads, heads), where
    assert (call.head_dim, call.v_head_dim) == spec.head_dims, where
    assert call.scale == pytest.approx(1.0 if scaled_before else spec.softmax_scale, rel=1e-9), where
    assert (call.softcap or None) == spec.logit_softcap, where
    assert call.sinks == spec.sinks, where
    assert call.sparse == (spec.sparse == "dsa"), where
    assert call.causal == (spec.attn_type == "decoder"), where
    seen = spec.sliding_window if spec.attention_chunk is None else FAR % spec.attention_chunk + 1
    assert call.window == seen, where


def by_layer(model: ModelSpec) -> dict[int, AttentionSpec]:
    """Decoder (or only-encoder) layer -> its softmax attention."""
    return {
        i: spec
        for name, spec in model.groups.items()
        if isinstance(spec, AttentionSpec) and not name.startswith("vision") and spec.attn_type != "cross"
        for i in spec.layers
    }


def compare(config: Any, **inputs: tuple[int, ...]) -> ModelSpec:
    model = ModelSpec.from_hf_config(config)
    expected = by_layer(model)
    calls = record(config, **inputs)
    positions = [i if call.layer is None else call.layer for i, call in enumerate(calls)]
    assert positions == sorted(expected)
    for position, call in zip(positions, calls):
        check(call, expected[position], (call.module, position))
    return model


NOT_RUN = (*SEQ2SEQ, "mimo-v2-flash-nosink")  # transformers knows no sink flags: its sliding layers always have sinks


@pytest.mark.parametrize("name", [n for n in FILES if n not in NOT_RUN])
def test_file_against_the_modelling_code(name: str) -> None:
    compare(config_of(name, **({"num_hidden_layers": 4} if name in DEEP else {})))


def test_whisper_and_t5_call_encoder_then_self_and_cross_in_turn() -> None:
    for name, inputs in SEQ2SEQ.items():
        config = config_of(name)
        whisper = name.startswith("whisper")
        model = ModelSpec.from_hf_config(config)
        encoder, own, cross = (model.groups[g] for g in ("encoder", "full", "cross"))
        calls = record(config, **(inputs | ({"input_features": (1, config.num_mel_bins, 3000)} if whisper else {})))
        deep = len(encoder.layers)
        assert len(calls) == deep + 2 * len(own.layers)
        for i, call in enumerate(calls):
            group = encoder if i < deep else (own, cross)[(i - deep) % 2]
            # Whisper multiplies q by the scale before the call, so the call itself says 1.
            check(call, group, (name, i), scaled_before=whisper)
            assert call.bias == (group.bias or (group is cross and not whisper)), (name, i)  # T5's cross bias is zeros


PROBES: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 144, "head_dim": 128, "attn_logit_softcapping": 30.0, "sliding_window": 77},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 50},
    "gemma4_text": {"num_hidden_layers": 7, "sliding_window": 50, "global_head_dim": 384},
    "granite": {"attention_multiplier": 0.0078125},
    "granite_swa": {},
    "hy_v4": {"num_hidden_layers": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 3, "head_dim": 96},
    "mistral": {"sliding_window": 321},
    "mixtral": {"num_key_value_heads": 4, "num_local_experts": 2},
    "phi3": {"sliding_window": 2047},
    "starcoder2": {"sliding_window": 512},
    "cohere2": {"sliding_window": 100, "num_hidden_layers": 9},
    "cwm": {"num_hidden_layers": 9},
    "mellum": {},
    "smollm3": {},
    "lfm2": {},
    "gpt2": {"scale_attn_weights": False},
    "gpt_bigcode": {},
    "gpt_neox": {"num_attention_heads": 48},
    "stablelm": {"num_key_value_heads": 4},
    "minicpm3": {},
    "youtu": {},
    "glm4_moe_lite": {"n_routed_experts": 4},
    "modernbert-decoder": {"local_attention": 40},
    "modernbert": {"local_attention": 40, "global_attn_every_n_layers": 4},
    "bert": {"is_decoder": True},
    "roberta": {},
    "nomic_bert": {},
    "qwen3_5_text": {},
    "olmo3": {"sliding_window": 33},
    "mimo_v2_flash": {"sliding_window_size": 40},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
        "rope_parameters": {"rope_type": "yarn", "factor": 12.0, "mscale": 0.9, "mscale_all_dim": 0.5,
                            "original_max_position_embeddings": 4096, "rope_theta": 10000.0},
    },
}  # fmt: skip
"""Config classes with unusual values: what a rule depends on must move our spec as it moves the model."""


@pytest.mark.parametrize("kind", PROBES)
def test_rule_against_the_modelling_code(kind: str) -> None:
    compare(AutoConfig.for_model(kind, **{"num_hidden_layers": 5, **PROBES[kind]}))


def test_gemma_embedding_windows_are_two_sided() -> None:
    config = AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True, sliding_window=512)
    model = compare(config)
    assert {g.attn_type for g in model.groups.values()} == {"encoder_only"}
    assert model.groups["sliding"].sliding_window == 257


def test_gemma4_from_its_default_config() -> None:
    config = CONFIG_MAPPING["gemma4"]()
    model = ModelSpec.from_hf_config(config)
    sliding, full = model.groups["sliding"], model.groups["full"]
    text = config.text_config
    assert (sliding.head_dim, full.head_dim) == (256, 512)
    assert sliding.softmax_scale == full.softmax_scale == 1.0
    assert sliding.sliding_window == text.sliding_window == 512
    assert full.layers == tuple(i for i, kind in enumerate(text.layer_types) if kind == "full_attention")
    for name, spec in model.groups.items():
        assert isinstance(spec, AttentionSpec)
        for i in spec.layers:
            layer = text.per_layer_config[i]
            assert (spec.head_dim, spec.num_kv_heads) == (layer.head_dim, layer.num_key_value_heads), (name, i)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_shared_kv_layers_read_the_group_that_stores(kind: str) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=20, num_kv_shared_layers=6)
    model = ModelSpec.from_hf_config(config)
    modes = config.kv_sharing_modes
    shared = {i for name, g in model.groups.items() if name.endswith("_shared") for i in g.layers}
    assert shared == {i for i, mode in enumerate(modes) if mode == "reuse"} == set(range(14, 20))
    for name, g in model.groups.items():
        assert g.kv_from == (name.removesuffix("_shared") if name.endswith("_shared") else None)
        kinds = {config.layer_types[i] for i in g.layers}
        assert kinds == {f"{name.removesuffix('_shared')}_attention"}
    assert all(g.scale == 1.0 for g in model.groups.values())


def test_gemma4_shares_kv_heads_of_full_layers_only_where_k_equals_v() -> None:
    for tied in (False, True):
        config = AutoConfig.for_model(
            "gemma4_text", num_hidden_layers=6, attention_k_eq_v=tied, num_global_key_value_heads=2
        )
        assert compare(config).groups["full"].num_kv_heads == (2 if tied else 4)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("gemma3", {}, {"sliding": True, "full": True}),
        ("gemma4", {"use_bidirectional_attention": "vision"}, {"sliding": True, "full": False}),
        ("gemma4", {}, {"sliding": False, "full": False}),
        ("paligemma", {}, {"full": True}),
    ],
)
def test_images_see_both_ways_where_the_model_says(kind: str, text: dict[str, Any], expected: dict[str, bool]) -> None:
    inner = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "paligemma": "gemma"}[kind]
    model = ModelSpec.from_hf_config(AutoConfig.for_model(kind, text_config={"model_type": inner, **text}))
    assert {n: model.groups[n].bidirectional_prefix for n in expected} == expected
    assert all(model.groups[n].attn_type == "decoder" for n in expected)


def test_cross_attention_module_of_mllama() -> None:
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    config = config_of("llama-3.2-11b-vision").text_config
    spec = ModelSpec.from_hf_config(DATA / "llama-3.2-11b-vision.json").groups["cross"]
    with torch.device("meta"):
        module = MllamaTextCrossAttention(config, layer_idx=3)
    assert (module.num_heads, module.num_key_value_heads, module.head_dim) == (
        spec.num_heads, spec.num_kv_heads, spec.head_dim,
    )  # fmt: skip
    assert module.scaling == pytest.approx(spec.softmax_scale)
    assert spec.layers == tuple(config.cross_attention_layers)


def _towers() -> Iterator[tuple[str, Any, int]]:
    """(file, its tower's attention module, layers) built from the class the model uses."""
    from transformers.models.llama4.modeling_llama4 import Llama4VisionAttention
    from transformers.models.mllama.modeling_mllama import MllamaVisionAttention
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionAttention
    from transformers.models.siglip.modeling_siglip import SiglipAttention

    for name, cls in {
        "gemma-3-12b-it": SiglipAttention, "llama-3.2-11b-vision": MllamaVisionAttention,
        "llama-4-scout-17b-16e": Llama4VisionAttention, "qwen2.5-vl-7b": Qwen2_5_VLVisionAttention,
        "qwen3.5-35b-a3b": Qwen3_5MoeVisionAttention,
    }.items():  # fmt: skip
        config = config_of(name).vision_config
        with torch.device("meta"):
            yield name, cls(config), config.num_hidden_layers + getattr(config, "num_global_layers", 0)


def test_image_towers_against_their_attention_modules() -> None:
    for name, module, layers in _towers():
        groups = {n: g for n, g in ModelSpec.from_hf_config(DATA / f"{name}.json").groups.items() if "vision" in n}
        for g in groups.values():
            assert isinstance(g, AttentionSpec)
            assert g.attn_type == "encoder_only", name
            heads = getattr(module, "num_heads", None) or module.num_attention_heads
            assert (g.num_heads, g.head_dim) == (heads, module.head_dim), name
            scale = getattr(module, "scaling", None) or module.scale
            assert g.softmax_scale == pytest.approx(scale), name
        assert sorted(i for g in groups.values() for i in g.layers) == list(range(layers)), name


@pytest.mark.parametrize("heads", [8, 12, 71, 112])
def test_slopes_against_the_bias_that_models_build(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    width, n = 64, 5
    bloom = AutoConfig.for_model("bloom", n_head=heads, hidden_size=heads * width)
    mpt = AutoConfig.for_model("mpt", n_heads=heads, d_model=heads * width)
    falcon = AutoConfig.for_model("falcon", num_attention_heads=heads, hidden_size=heads * width, alibi=True)
    slopes = [ModelSpec.from_hf_config(c).groups["full"].alibi_slopes for c in (bloom, mpt, falcon)]
    bias = build_alibi_tensor(torch.ones(1, n), heads, torch.float32).view(heads, n)
    assert slopes[0] == pytest.approx((bias[:, -1] / (n - 1)).tolist(), rel=1e-6)
    distance = build_mpt_alibi_tensor(heads, n).view(heads, n)  # 0 for the last key, -slope per step back
    assert slopes[1] == pytest.approx((distance[:, -1] - distance[:, -2]).tolist(), rel=1e-6)
    # FalconAttention adds the same bias as BLOOM before it multiplies by 1/sqrt(head_dim).
    assert slopes[2] == pytest.approx([s / math.sqrt(width) for s in slopes[0] or ()], rel=1e-6)


def test_class_defaults_are_those_of_transformers() -> None:
    for kind, row in DEFAULTS.items():
        cls = CONFIG_MAPPING[kind]
        declared = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        declared |= {ours: declared[theirs] for ours, theirs in cls.attribute_map.items() if theirs in declared}
        seen, built = View(declared), View(cls().to_dict())
        for name in row:
            if name != "sliding_window_pattern":
                value = seen.get(name) if seen.get(name) is not None else built.get(name)
                assert row[name] == (tuple(value) if isinstance(value, list) else value), (kind, name)
    for kind, row in TOWERS.items():
        cls = CONFIG_MAPPING.get(kind, CONFIG_MAPPING.get(f"{kind}_vision"))
        if cls is not None:
            built = View(cls().to_dict())
            for name in row.keys() - {"scale"}:
                value = built.get(name)
                assert row[name] == (tuple(value) if isinstance(value, list) else value), (kind, name)


UNSTATED = ("mimo_v2_flash", "kimi_linear", "flint")
"""Their layers are listed in every checkpoint; without a list we ask for one."""
CONTRADICTORY = ("glm4_moe", "glm4v_moe_text", "qwen3_omni_moe_text")
"""Their class defaults have a hidden_size that is no multiple of the heads, and no head_dim."""
SIZES = {"encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads", "layers_block_type"}


def test_a_config_that_states_only_its_sizes_means_the_class_defaults() -> None:
    for kind in READERS:
        if kind not in CONFIG_MAPPING or kind in UNSTATED:
            continue
        config = CONFIG_MAPPING[kind]()
        data = config.to_dict()
        if "text_config" in data or kind in CONTRADICTORY:
            continue  # composites have tests of their own
        keep = {key for name in STATED for key in SPELLINGS[name]} | SIZES
        raw = {"model_type": kind, **{k: v for k, v in data.items() if k in keep}}
        ours, theirs = ModelSpec.from_hf_config(raw).groups, ModelSpec.from_hf_config(config).groups
        assert list(ours) == list(theirs), kind
        for name, spec in ours.items():
            assert _numbers(spec) == _numbers(theirs[name]), (kind, name)


def _numbers(spec: AttentionSpec | LinearSpec) -> dict[str, Any]:
    """All of a spec, with the scale as the number it stands for."""
    scale = {"scale": pytest.approx(spec.softmax_scale)} if isinstance(spec, AttentionSpec) else {}
    return {**spec.to_json(), **scale}


def test_reading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from attn_core.models import read_hf_config; read_hf_config(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(DATA / "gemma-3-12b-it.json")], check=True)
