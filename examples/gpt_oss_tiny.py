"""A GPT-OSS of the size of a toy: Hugging Face's own model with weights that make its tokens depend on everything.

Random weights of the usual 0.02 make attention nearly uniform and the output nearly constant: such a model agrees with
anything. These do not (see the negative controls of ``paged_engine``).
"""

from __future__ import annotations

import torch
from transformers import GptOssConfig, GptOssForCausalLM


def make_model(seed: int = 0, *, window: int = 12, layers: int = 4) -> GptOssForCausalLM:
    """Layers alternate sliding and full, 8/2 heads x 32, 4 experts, float32. Matrices and biases N(0, 0.12²), sinks and
    untied embeddings N(0, 1)."""
    config = GptOssConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=window,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        dtype="float32",
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "sinks")):
                weight.normal_(0.0, 1.0, generator=generator)
            elif not name.endswith("norm.weight"):
                weight.normal_(0.0, 0.12, generator=generator)
    return model


def make_prompts(count: int, *, shortest: int = 3, longest: int = 40, seed: int = 1) -> list[list[int]]:
    """Random prompts of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lens]


@torch.inference_mode()
def generate_eager(model: GptOssForCausalLM, prompt: list[int], max_new: int) -> list[int]:
    """The reference: transformers' greedy generation with eager attention, this request alone."""
    ids = torch.tensor([prompt], device=model.device)
    whole = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, do_sample=False, max_new_tokens=max_new, **whole)
    return out[0, len(prompt) :].tolist()
