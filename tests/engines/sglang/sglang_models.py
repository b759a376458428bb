"""Toy models whose greedy tokens depend on every part of attention, and what transformers says they are.

Weights of the usual 0.02 make attention nearly uniform: such a model agrees with any attention. These do not, as the
negative controls show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

WINDOW = 16
NEW_TOKENS = 16
PROMPT_LENS = (6, 18, 64, 131)
ALL = len(PROMPT_LENS) * NEW_TOKENS
LAYERS = 2

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32",
    "attn_implementation": "eager",
}  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=False))


def gemma2() -> PreTrainedModel:
    """Softcap 5, windows of 16 in every other layer, final logits capped at 30."""
    config = Gemma2Config(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, attn_logit_softcapping=5.0,
        hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Sinks, windows of 16 in every other layer, four experts."""
    config = GptOssConfig(
        **SIZES, head_dim=64, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GptOssForCausalLM(config)


def deepseek_v2() -> PreTrainedModel:
    """MLA: latent 64, rope 16; dense layers, yarn. ``moe_layer_freq`` is what SGLang reads beside transformers."""
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
    }  # fmt: skip
    config = DeepseekV2Config(
        **{**SIZES, "num_key_value_heads": 4}, kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=LAYERS, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, topk_group=1, n_group=1, moe_layer_freq=1, tie_word_embeddings=False,
        rope_parameters=yarn,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config)


MAKERS = {"llama": llama, "gemma2": gemma2, "gpt_oss": gpt_oss, "deepseek_v2": deepseek_v2}
STDS = {"gemma2": (0.24, 0.02)}
"""(matrices, embeddings); Gemma2 ties its embeddings and scales them up."""


def make(name: str, folder: Path) -> list[list[int]]:
    """Save the model for the engine; the reference is transformers' greedy tokens, each prompt alone."""
    model = MAKERS[name]().eval()
    matrices, embeddings = STDS.get(name, (0.12, 1.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if part.endswith("embed_tokens.weight"):
                weight.normal_(0.0, embeddings, generator=generator)
            elif part.endswith("sinks"):
                weight.normal_(0.0, 1.0, generator=generator)
            elif not part.endswith("norm.weight"):
                weight.normal_(0.0, matrices, generator=generator)
    model.save_pretrained(folder)
    return [greedy(model, prompt) for prompt in prompts()]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in PROMPT_LENS]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **whole)
    return out[0, len(prompt) :].tolist()
