"""The page on continuous batching: its code runs, and what it prints and makes is what it says."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from docblocks import blocks
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

if find_spec("transformers.generation.continuous_batching.cache_allocators") is None:
    pytest.skip("this transformers has another paged cache", allow_module_level=True)

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "continuous-batching.md").read_text(encoding="utf-8")
TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}


def test_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    found = [b for b in blocks(PAGE) if b.language == "python"]
    assert {b.kind for b in found} == {"run"}
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, vocab_size=50, dtype="float32", eos_token_id=None, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    encoder = BertModel(BertConfig(**TINY)).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    space: dict[str, Any] = {"model": model, "encoder": encoder, "prompts": prompts}
    for b in found:
        exec(b.body, space)
    for prompt, tokens in zip(prompts, space["tokens"]):
        ids = torch.tensor([prompt])
        whole = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        assert model.generate(ids, do_sample=False, max_new_tokens=8, **whole)[0, len(prompt) :].tolist() == tokens
    told = capsys.readouterr().out
    assert "page_size: 1  (pinned by the engine)" in told
    assert "BertModel has no generate_batch" in told
    assert f"{space['attn'].calls} layers run" in told
    assert space["attn"].calls >= 2 * 8


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (DOCS / link).exists(), link
