"""Toy models of transformers, one per family, whose tokens depend on every detail of their attention.

Random weights of the usual 0.02 make attention nearly uniform: such a model agrees with anything. Here matrices are
N(0, 0.12²), embeddings (untied), relative position biases and sinks N(0, 1); prompts outgrow windows and chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf

VOCAB = 97


@dataclass(frozen=True)
class Family:
    name: str
    make: Callable[[], Any]
    kind: str = "decoder"
    """``decoder``, ``encoder``, or ``seq2seq``; ``audio`` is seq2seq from features."""
    features: tuple[str, ...] = field(default=())
    """What its groups must hold: fields of AttentionSpec that differ from their defaults."""


def build(model_class: Any, config: Any) -> Any:
    """The model in float32 with weights as described, ready to run eagerly."""
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("sinks", "shared.weight", "relative_attention_bias.weight")) or "embed" in name:
                weight.normal_(0.0, 1.0, generator=generator)
            elif weight.dim() > 1:
                weight.normal_(0.0, 0.12, generator=generator)
    return model


def _decoder(name: str, **fields: Any) -> Callable[[], Any]:
    """``NameConfig`` and ``NameForCausalLM`` with toy sizes."""

    def make() -> Any:
        sizes = {
            "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
            "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        config_class = getattr(tf, CONFIGS.get(name, f"{name}Config"))
        return build(getattr(tf, f"{name}ForCausalLM"), config_class(**{**sizes, **fields}))

    return make


CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig", "Llama4": "Llama4TextConfig"}

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip


def _bert() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 3}
    return build(tf.BertModel, tf.BertConfig(**sizes, num_hidden_layers=2))


def _modernbert() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 3}
    return build(
        tf.ModernBertModel, tf.ModernBertConfig(**sizes, num_hidden_layers=4, local_attention=10, pad_token_id=0)
    )


def _whisper() -> Any:
    config = tf.WhisperConfig(
        vocab_size=VOCAB, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=20,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, tie_word_embeddings=False,
    )  # fmt: skip
    return build(tf.WhisperForConditionalGeneration, config)


def _t5() -> Any:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=48, d_ff=40, num_heads=3, d_kv=16, num_layers=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, pad_token_id=0, eos_token_id=None,
        decoder_start_token_id=0,
    )  # fmt: skip
    return build(tf.T5ForConditionalGeneration, config)


FAMILIES = (
    Family("llama", _decoder("Llama")),
    Family("qwen3", _decoder("Qwen3")),
    Family("mistral", _decoder("Mistral", sliding_window=6), features=("sliding_window",)),
    Family(
        "gemma2",
        _decoder("Gemma2", sliding_window=6, query_pre_attn_scalar=10, attn_logit_softcapping=2.0),
        features=("sliding_window", "logit_softcap", "scale"),
    ),
    Family("gpt_oss", _decoder("GptOss", sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
           features=("sliding_window", "sinks")),
    Family("qwen3_moe", _decoder("Qwen3Moe", **_MOE)),
    Family("gemma3", _decoder("Gemma3", sliding_window=6, query_pre_attn_scalar=10,
                              layer_types=["sliding_attention", "full_attention"] * 2),
           features=("sliding_window", "scale")),
    Family(
        "gemma4",
        _decoder("Gemma4", sliding_window=6, global_head_dim=32, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
                 vocab_size_per_layer_input=VOCAB, layer_types=["sliding_attention", "full_attention"] * 2),
        features=("sliding_window", "scale", "kv_from"),
    ),
    Family(
        "mimo_v2_flash",
        _decoder("MiMoV2Flash", v_head_dim=12, sliding_window=6, n_routed_experts=4, num_experts_per_tok=2,
                 moe_intermediate_size=24, n_group=1, topk_group=1,
                 layer_types=["full_attention", "sliding_attention"] * 2),
        features=("sliding_window", "sinks", "v_head_dim"),
    ),
    Family("deepseek_v3", _decoder("DeepseekV3", **_MLA), features=("v_head_dim",)),
    Family("deepseek_v32", _decoder("DeepseekV32", **_MLA, index_topk=5, index_n_heads=2, index_head_dim=16),
           features=("sparse", "v_head_dim")),
    Family(
        "qwen3_next",
        _decoder("Qwen3Next", **_MOE, shared_expert_intermediate_size=24, linear_num_key_heads=2,
                 linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
    ),
    Family(
        "llama4",
        _decoder("Llama4", attention_chunk_size=6, num_local_experts=4, intermediate_size_mlp=40,
                 layer_types=["chunked_attention", "chunked_attention", "full_attention", "chunked_attention"]),
        features=("attention_chunk",),
    ),
    Family("bert", _bert, "encoder"),
    Family("modernbert", _modernbert, "encoder", ("sliding_window",)),
    Family("whisper", _whisper, "audio", ("scale",)),
    Family("t5", _t5, "seq2seq", ("scale", "bias")),
)  # fmt: skip
