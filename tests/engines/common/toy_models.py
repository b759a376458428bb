"""Toy models whose greedy tokens depend on every part of attention, and what transformers says they are.

Weights of the usual 0.02 make attention nearly uniform: such a model agrees with any attention. These do not, as the
negative controls show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

WINDOW = 16
NEW_TOKENS = 16
PROMPT_LENS = (6, 18, 64, 131)
TOTAL = NEW_TOKENS * len(PROMPT_LENS)

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32", "attn_implementation": "eager",
}  # fmt: skip


def llama(head_dim: int = 32) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, head_dim=head_dim, tie_word_embeddings=False))


def gemma2() -> hf.PreTrainedModel:
    """Softcap 5, windows of 16 in every other layer, final logits capped at 30."""
    config = hf.Gemma2Config(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, attn_logit_softcapping=5.0,
        hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config)


def gpt_oss() -> hf.PreTrainedModel:
    """Sinks, windows of 16 in every other layer, four experts."""
    config = hf.GptOssConfig(
        **SIZES, head_dim=64, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.GptOssForCausalLM(config)


def gemma3n() -> hf.PreTrainedModel:
    """The last two layers read the caches of the last sliding and full layer before them."""
    config = hf.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 6}, head_dim=32, sliding_window=WINDOW, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3, vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=16, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6,
    )  # fmt: skip
    return hf.Gemma3nForCausalLM(config)


def deepseek() -> hf.PreTrainedModel:
    """MLA with a latent of 512 and 64 rotary columns, the one size that vLLM's own kernel for CPUs has."""
    config = hf.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32,
        qk_rope_head_dim=64, v_head_dim=48, first_k_dense_replace=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM(config)


def bert() -> hf.PreTrainedModel:
    config = hf.BertConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=256, dtype="float32",
    )  # fmt: skip
    return hf.BertModel(config, add_pooling_layer=False)


MAKERS = {
    "llama": llama,
    "llama64": lambda: llama(64),
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "gemma3n": gemma3n,
    "deepseek": deepseek,
    "bert": bert,
}
STDS = {"gemma2": (0.24, 0.02), "gemma3n": (0.12, 0.3)}
"""(matrices, embeddings); Gemmas tie their embeddings and scale them up."""


def make(name: str, folder: Path) -> list[list[Any]]:
    """Save the model for the engine; what comes back are transformers' greedy tokens, each prompt alone, or of an
    encoder the last hidden states' unit vectors."""
    model = MAKERS[name]().eval()
    matrices, embeddings = STDS.get(name, (0.12, 1.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if part.endswith("embed_tokens.weight"):
                weight.normal_(0.0, embeddings, generator=generator)
            elif part.endswith("sinks"):
                weight.normal_(0.0, 1.0, generator=generator)
            elif "norm" not in part.lower():
                weight.normal_(0.0, matrices, generator=generator)
    model.save_pretrained(folder)
    return [(greedy if model.can_generate() else encoded)(model, prompt) for prompt in prompts()]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in PROMPT_LENS]


@torch.inference_mode()
def greedy(model: hf.PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **whole)
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def encoded(model: hf.PreTrainedModel, prompt: list[int]) -> list[list[float]]:
    states = model(torch.tensor([prompt])).last_hidden_state[0]
    return torch.nn.functional.normalize(states, dim=-1).tolist()


def score(got: list[list[int]], want: list[list[int]]) -> int:
    """Tokens that agree, of :data:`TOTAL` for all prompts."""
    return sum(a == b for g, w in zip(got, want) for a, b in zip(g, w))
