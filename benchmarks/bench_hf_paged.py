"""transformers' continuous batching on our kernels over its own ``paged|eager``: CPU time of the same requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import Result, ratios, result
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from attn_core.integrations import hf_paged

REQUESTS, NEW = 8, 16


def serving() -> Iterator[Result]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, dtype="float32", attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for length in (300, 1200):
        prompts = [torch.randint(0, 256, (length + 7 * i,)).tolist() for i in range(REQUESTS)]
        theirs, ours = [], []
        for _ in range(3):
            theirs.append(_seconds(model, prompts))
            with hf_paged.continuous_batching(model):
                ours.append(_seconds(model, prompts))
        name = f"generate_batch, {REQUESTS} prompts of {length}, {NEW} new tokens: over paged|eager"
        yield result(name, ratios(ours, theirs), "x", limit=1, at_most=False)


def _seconds(model: Any, prompts: list[list[int]]) -> float:
    batching = ContinuousBatchingConfig(page_size=64, num_blocks=220, max_batch_tokens=512)
    wanted = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    start = time.process_time()
    outputs = model.generate_batch(prompts, generation_config=wanted, continuous_batching_config=batching)
    spent = time.process_time() - start
    if any(len(o.generated_tokens) != NEW for o in outputs.values()):
        raise RuntimeError("a request failed; its time means nothing")
    return spent


ALL = (serving,)
