"""Forwards of transformers models with attn_core and with sdpa, in turn in one process: CPU time of one thread."""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Result
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from attn_core.integrations import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

PAIRS = 30


def compared(name: str, model: Any, run: Callable[[Any], Callable[[], Any]], *, limit: float | None) -> Result:
    """CPU time with attn_core over that with sdpa: the geometric mean of ratios pair by pair, with its 95 % interval.

    ``run(model)`` gives the function to time. The limit is on the interval's upper end.
    """
    hf.register()
    calls = []
    for implementation in (hf.NAME, "sdpa"):
        mine = copy.deepcopy(model)
        mine.set_attn_implementation(implementation)
        calls.append(run(mine))
    torch.testing.assert_close(*(call() for call in calls), atol=2e-4, rtol=1e-3)
    logs = []
    for i in range(PAIRS):
        spent = [0.0, 0.0]
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.process_time()
            calls[which]()
            spent[which] = time.process_time() - start
        logs.append(math.log(spent[0] / spent[1]))
    middle, half = statistics.mean(logs), 2.05 * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(middle - half), math.exp(middle + half)
    note = f"mean {math.exp(middle):.3f}, {spent[1] * 1e3:.1f} ms with sdpa"
    return Result(f"{name}: attn_core / sdpa, upper end of 95 %", high, "x CPU", low, high, limit=limit, note=note)


def minilm() -> Iterator[Result]:
    """Sentence embeddings with real weights."""
    torch.set_num_threads(1)
    import minilm as example

    model, tokenizer = example.load()
    texts = example.sentences(16)
    for batch, what in ((texts, "16 padded sentences"), (texts[10:11] * 8, "8 equal sentences")):
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        keep = inputs["attention_mask"].bool()

        def run(m: Any) -> Callable[[], Any]:
            return torch.inference_mode()(lambda: m(**inputs).last_hidden_state[keep])  # noqa: B023

        yield compared(f"MiniLM, {what}", model, run, limit=1.05)


def llama() -> Iterator[Result]:
    """Hidden size 512, 8 heads over 2 of keys and values, 4 layers, random weights: prompts, and steps over a cache."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for size, length in ((1, 512), (4, 128)):
        ids = torch.randint(1, 1000, (size, length))

        def prompt(m: Any) -> Callable[[], Any]:
            return torch.inference_mode()(lambda: m(input_ids=ids).logits)  # noqa: B023

        yield compared(f"Llama, prompt {size} x {length}", model, prompt, limit=1.05)
    ids = torch.randint(1, 1000, (4, 128))
    mask = torch.ones_like(ids)
    mask[1, :50] = mask[3, :100] = 0

    def padded(m: Any) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: m(input_ids=ids, attention_mask=mask).logits[mask.bool()])

    yield compared("Llama, padded prompt 4 x 128", model, padded, limit=1.05)
    for size, length in ((1, 512), (4, 128)):
        ids = torch.randint(1, 1000, (size, length))

        def steps(m: Any) -> Callable[[], Any]:
            @torch.inference_mode()
            def four() -> torch.Tensor:
                cache = copy.deepcopy(filled)
                return torch.cat([m(input_ids=ids[:, :1], past_key_values=cache).logits for _ in range(4)])  # noqa: B023

            with torch.inference_mode():
                filled = m(input_ids=ids, past_key_values=DynamicCache(config=config)).past_key_values  # noqa: B023
            return four

        yield compared(f"Llama, 4 steps of {size} after {length}", model, steps, limit=None)


ALL = (minilm, llama)
