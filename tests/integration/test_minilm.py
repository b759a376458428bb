"""MiniLM with its real weights: attn-core under transformers gives eager attention's embeddings."""

from __future__ import annotations

import copy

import minilm
import pytest
import torch
from torch import Tensor

from attn_core.integrations import hf_models
from attn_core.integrations import transformers as hf
from attn_core.platform import Platform

TEXTS = minilm.sentences(12)


@pytest.fixture(scope="module")
def loaded():
    return minilm.load()


@pytest.fixture(scope="module")
def eager(loaded) -> Tensor:
    model, tokenizer = loaded
    model.set_attn_implementation("eager")
    return minilm.embed(model, tokenizer, TEXTS)


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_agree_whatever_the_padding(loaded, eager, side):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    assert len({len(ids) for ids in tokenizer(TEXTS)["input_ids"]}) > 5  # so there is padding to get wrong
    if side == "left":  # absolute positions shift with the padding, in eager as well
        eager = minilm.embed(model, tokenizer, TEXTS, side)
    attn = hf.attach(model)
    found = minilm.agreement(minilm.embed(model, tokenizer, TEXTS, side), eager)
    assert found.max_abs <= 1e-5
    assert found.min_cosine >= 1 - 1e-6
    (group,) = attn.groups.values()
    assert (group.spec.attn_type, group.spec.num_heads, group.spec.head_dim) == ("encoder_only", 12, 32)
    assert group.spec.dtype == "float32"


def test_the_comparison_can_fail(loaded, eager):
    """A scale that is 1% off is seen by the bound."""
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight *= 1.01
            layer.attention.self.query.bias *= 1.01
    hf.attach(model)
    assert minilm.agreement(minilm.embed(model, tokenizer, TEXTS), eager).max_abs > 1e-4


def test_set_attn_implementation_alone_decides_once_per_model(loaded, eager, monkeypatch):
    """Bound at the first forward, then never again, whatever batches come."""
    made = []
    whole = Platform.attention_backend
    monkeypatch.setattr(Platform, "attention_backend", lambda *a, **k: made.append(1) or whole(*a, **k))
    hf.register()
    made.clear()
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    model.set_attn_implementation(hf.NAME)
    for texts in (TEXTS, TEXTS[:3], TEXTS):
        got = minilm.embed(model, tokenizer, texts)
        assert minilm.agreement(got, eager[: len(texts)]).max_abs <= 1e-5
    assert len(made) == 1


def test_nothing_is_kept_for_models_that_are_gone(loaded):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    model.set_attn_implementation(hf.NAME)
    before = len(hf_models._owners), len(hf_models._by_config)
    minilm.embed(model, tokenizer, TEXTS[:2])
    assert len(hf_models._owners) == before[0] + model.config.num_hidden_layers
    del model
    assert (len(hf_models._owners), len(hf_models._by_config)) == before
