"""Models of transformers end to end on our kernels: logits and tokens of eager attention, over every kind of cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hf_families import FAMILIES, VOCAB, Family, build
from torch import Tensor
from transformers import DynamicCache, StaticCache, T5EncoderModel
from transformers.utils import logging

from attn_core import AttnCoreError, BadInputError, ModelSpec
from attn_core.integrations import hf_mask, hf_models
from attn_core.integrations import transformers as hf

LENS = (9, 21, 1, 14)
EAGER, OURS = "eager", hf.NAME
TOLERANCE = 1e-5
BY_NAME = {f.name: f for f in FAMILIES}
DECODERS = [f.name for f in FAMILIES if f.kind == "decoder"]
MORE = 12
"""Tokens to generate."""

logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _registered() -> None:
    hf.register()


@cache
def model_of(name: str) -> Any:
    return BY_NAME[name].make()


def batch(side: str = "left") -> tuple[Tensor, Tensor]:
    """Token ids and which are real."""
    longest, lens = max(LENS), torch.tensor(LENS)[:, None]
    place = torch.arange(longest)
    keep = place < lens if side == "right" else place >= longest - lens
    ids = torch.randint(1, VOCAB, keep.shape, generator=torch.Generator().manual_seed(5))
    return ids * keep, keep


@torch.inference_mode()
def under(implementation: str, model: Any, run: Callable[[Any], Any]) -> Any:
    model.set_attn_implementation(implementation)
    return run(model)


def agree(model: Any, run: Callable[[Any], list[Tensor]]) -> None:
    """All tensors that ``run`` returns: floats within the tolerance of eager's, tokens equal."""
    want, got = (under(name, model, run) for name in (EAGER, OURS))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE if a.is_floating_point() else 0, rtol=0)


def padded(model: Any, side: str = "left") -> list[Tensor]:
    ids, keep = batch(side)
    return [model(input_ids=ids, attention_mask=keep.long()).logits[keep]]


def in_steps(model: Any, kv_cache: Any) -> list[Tensor]:
    """A padded prompt in two pieces, then token by token."""
    ids, keep = batch()
    found = []
    for start, end in ((0, 8), (8, 17), (17, 18), (18, 19), (19, 20), (20, 21)):
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=keep[:, :end].long(),
            past_key_values=kv_cache,
            position_ids=(keep.long().cumsum(1) - 1).clamp(0)[:, start:end],
        )
        found.append(out.logits[keep[:, start:end]])
    return found


def generated(model: Any, **options: Any) -> list[Tensor]:
    ids, keep = batch()
    plain = {"do_sample": False, "max_new_tokens": MORE, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(ids, attention_mask=keep.long(), **{**plain, **options})]


# equal to eager -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_decision_holds_what_the_family_has(family: Family) -> None:
    """So that the tests below cannot pass for want of the feature."""
    attn = hf.attach(family.make())
    plain = {"v_head_dim": None, "sparse": "none", "sinks": False, "bias": False}
    for feature in family.features:
        values = {getattr(g.spec, feature) for g in attn.groups.values()}
        if feature == "v_head_dim":
            values = {g.spec.v_head_dim for g in attn.groups.values() if g.spec.v_head_dim != g.spec.head_dim}
        assert values - {plain.get(feature)}, feature
    assert attn.decision.explain()


@pytest.mark.parametrize("name", DECODERS)
class TestDecoders:
    def test_one_prompt(self, name: str) -> None:
        ids = batch()[0][1:2]
        agree(model_of(name), lambda m: [m(input_ids=ids).logits, m(input_ids=ids, use_cache=False).logits])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_padded_batch(self, name: str, side: str) -> None:
        agree(model_of(name), lambda m: padded(m, side))

    def test_steps_over_a_dynamic_cache(self, name: str) -> None:
        agree(model_of(name), lambda m: in_steps(m, DynamicCache(config=m.config)))

    def test_steps_over_a_static_cache(self, name: str) -> None:
        agree(model_of(name), lambda m: in_steps(m, StaticCache(config=m.config, max_cache_len=29)))

    def test_greedy_tokens(self, name: str) -> None:
        agree(model_of(name), generated)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_greedy_tokens_over_a_static_cache(name):
    agree(model_of(name), lambda m: generated(m, cache_implementation="static"))


def test_beams():
    agree(model_of("gpt_oss"), lambda m: generated(m, num_beams=3))


def test_guessed_tokens():
    """Several queries at a time over caches that are cropped again."""
    ids = batch()[0][1:2].repeat(1, 2)
    options = {"do_sample": False, "max_new_tokens": MORE, "eos_token_id": None, "pad_token_id": 0}
    agree(model_of("gpt_oss"), lambda m: [m.generate(ids, prompt_lookup_num_tokens=3, **options)])


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders(name, side):
    ids, keep = batch(side)
    agree(model_of(name), lambda m: [m(input_ids=ids, attention_mask=keep.long()).last_hidden_state[keep]])


def test_t5():
    (text, text_keep), (ids, keep) = batch("right"), batch("left")
    given = {"input_ids": text, "attention_mask": text_keep.long()}

    def run(m: Any) -> list[Tensor]:
        return [
            m(**given, decoder_input_ids=ids).logits,
            m(**given, decoder_input_ids=ids, decoder_attention_mask=keep.long()).logits[keep],
            m(input_ids=ids, attention_mask=keep.long(), decoder_input_ids=text[:, :1]).logits,
            m.generate(**given, do_sample=False, max_new_tokens=MORE, eos_token_id=None),
        ]

    agree(model_of("t5"), run)
    attached = BY_NAME["t5"].make()
    assert list(hf.attach(attached).groups) == ["encoder", "full", "cross"]
    agree(attached, run)


def test_whisper():
    sound = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1))
    ids, keep = (x[:3] for x in batch())

    def run(m: Any) -> list[Tensor]:
        first = m(input_features=sound, decoder_input_ids=ids[:, :20], decoder_attention_mask=keep[:, :20].long())
        steps = [
            m(encoder_outputs=(first.encoder_last_hidden_state,), decoder_input_ids=ids[:, 20:],
              decoder_attention_mask=keep.long(), past_key_values=first.past_key_values).logits
        ]  # fmt: skip
        return [first.logits[keep[:, :20]], *steps]

    agree(model_of("whisper"), run)
    attached = BY_NAME["whisper"].make()
    assert {g.scale for g in hf.attach(attached).groups.values()} == {1.0}
    agree(attached, run)


def test_an_encoder_of_t5_alone():
    """Its config does not say that it has no decoder; its class does."""
    ids, keep = batch("right")
    model = build(T5EncoderModel, model_of("t5").config)
    assert list(hf.attach(model).groups) == ["encoder"]
    agree(model, lambda m: [m(input_ids=ids, attention_mask=keep.long()).last_hidden_state[keep]])


# other ways to bind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"page_size": 16}, {"page_size": 4, "kv_layout": "HND"}, {"kv_layout": "HND"}])
@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash", "deepseek_v32"])
def test_other_pages(name, options):
    model = BY_NAME[name].make()
    attn = hf.attach(model, **options)
    assert {g.page_size for g in attn.groups.values()} == {options.get("page_size", 1)}
    for run in (padded, lambda m: in_steps(m, DynamicCache(config=m.config))):
        agree(model, run)


def test_another_backend():
    model = BY_NAME["gpt_oss"].make()
    attn = hf.attach(model, backend="flex_attention")
    assert {b.backend for g in attn.groups.values() for r, b in g.bindings.items() if r != "kv_write"} == {
        "flex_attention"
    }
    agree(model, padded)
    agree(model, lambda m: in_steps(m, DynamicCache(config=m.config)))


def test_one_decision_per_model_and_dtype(monkeypatch):
    made = []
    bind = hf_models._bind
    monkeypatch.setattr(
        hf_models, "_bind", lambda spec, *args: made.append(spec.groups["full"].dtype) or bind(spec, *args)
    )
    model = BY_NAME["gpt_oss"].make()
    under(OURS, model, generated)
    under(OURS, model, padded)
    assert made == ["float32"]
    under(OURS, model.to(torch.bfloat16), padded)
    assert made == ["float32", "bfloat16"]


def test_a_model_can_be_loaded_with_it(tmp_path):
    model = BY_NAME["llama"].make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=hf.NAME, dtype=torch.float32)
    assert loaded.config._attn_implementation == hf.NAME
    with torch.inference_mode():
        got = padded(loaded)[0]
    torch.testing.assert_close(got, under(EAGER, model, padded)[0], atol=TOLERANCE, rtol=0)


# a wrong kernel shows -------------------------------------------------------------------------------------------------

WRONG = {
    "scale": ("llama", lambda g: {"scale": g.softmax_scale * 1.01}),
    "window": ("mistral", lambda g: {"sliding_window": g.sliding_window - 1}),
    "chunk": ("llama4", lambda g: {"attention_chunk": g.attention_chunk and g.attention_chunk - 1}),
    "softcap": ("gemma2", lambda g: {"logit_softcap": None}),
    "sinks": ("gpt_oss", lambda g: {"sinks": False}),
}
"""What is wrong -> a model, and what its groups say instead."""


def _decided_wrongly(monkeypatch: pytest.MonkeyPatch, detail: str) -> Any:
    """A model whose decision was made for other attention than its layers call for."""
    name, changes = WRONG[detail]
    right = hf_models.spec_of

    def wrong(*args: Any) -> ModelSpec:
        spec = right(*args)
        return replace(spec, groups={n: replace(g, **changes(g)) for n, g in spec.groups.items()})

    monkeypatch.setattr(hf_models, "spec_of", wrong)
    return BY_NAME[name].make()


@pytest.mark.parametrize("detail", WRONG)
def test_a_decision_for_other_attention_is_refused(monkeypatch, detail):
    model = _decided_wrongly(monkeypatch, detail)
    with pytest.raises(AttnCoreError, match=r"the decision was made|more than padding"):
        under(OURS, model, padded)


@pytest.mark.parametrize("detail", WRONG)
@pytest.mark.parametrize("run", [padded, lambda m: in_steps(m, DynamicCache(config=m.config))], ids=["prompt", "steps"])
def test_and_would_show_if_it_were_not(monkeypatch, detail, run):
    """The guards taken away, every comparison above would fail."""
    model = _decided_wrongly(monkeypatch, detail)
    monkeypatch.setattr(hf, "check_call", lambda *args: None)
    monkeypatch.setattr(hf_mask, "_agree", lambda same: None)
    tensors = hf.tensors
    if detail == "sinks":
        monkeypatch.setattr(hf, "tensors", lambda group, module, kwargs: tensors(group, module, {}))
    got, want = under(OURS, model, run), under(EAGER, model, run)
    assert all(a.isfinite().all() for a in got)
    assert max(float((a - b).abs().max()) for a, b in zip(got, want)) > 100 * TOLERANCE


# refusals -------------------------------------------------------------------------------------------------------------


def call(model: Any, layer: int = 0, **kwargs: Any) -> Any:
    """One attention call of a decoder layer, as transformers makes it."""
    module = model.model.layers[layer].self_attn
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    said = {"sliding_window": getattr(module, "sliding_window", None), **kwargs}
    return hf.attention(module, q, k, k, None, scaling=0.25, **said)


def test_tensors_that_change_the_result_are_taken_or_refused():
    plain, with_sinks = model_of("llama"), model_of("gpt_oss")
    call(plain)
    call(plain, position_bias=torch.zeros(1, 4, 5, 5))  # zeros change nothing
    for name, value in (
        ("s_aux", torch.zeros(4)),
        ("position_bias", torch.ones(1, 4, 5, 5)),
        ("indices", torch.zeros(2, 5, 2, dtype=torch.int32)),
        ("brand_new", 1),
    ):
        with pytest.raises(BadInputError, match=name):
            call(plain, **{name: value})
    call(with_sinks, s_aux=torch.zeros(4))
    with pytest.raises(BadInputError, match="gives no 's_aux'"):
        call(with_sinks)


@pytest.mark.parametrize("whose", ["everybody's", "each sequence's own"])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_a_bias_of_any_shape_meets_the_right_tokens(whose, queries):
    """T5's own depends on distances alone, which hides where it starts."""
    module = model_of("t5").decoder.block[0].layer[0].SelfAttention
    lens, keys = torch.tensor([7, 4, 6])[:, None], 7
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 3, n, 16, generator=generator) for n in (queries, keys, keys))
    bias = torch.randn(1 if whose == "everybody's" else 3, 3, queries, keys, generator=generator)
    keep = torch.arange(keys) >= keys - lens
    mask = keep[:, None, None] & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    got = hf.attention(module, q, k, v, mask, scaling=1.0, position_bias=bias)[0]
    scores = (q @ k.mT + bias).masked_fill(~mask, float("-inf"))
    want = (scores.softmax(-1) @ v).transpose(1, 2)
    real = keep[:, -queries:]
    torch.testing.assert_close(got[real], want[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("entry", ["future", "hole", "packed", "window", "bias"])
def test_masks_that_say_more_are_refused(entry):
    model, ids = model_of("llama"), batch()[0][1:2]
    n = ids.shape[1]
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    if entry == "future":
        mask[:, :, :4, :4] = True
    elif entry == "hole":
        mask[..., 9] = False
    elif entry == "packed":
        half = torch.arange(n) < 9
        mask &= half[:, None] == half
    elif entry == "window":
        mask = mask.triu(-3)
    else:
        mask = torch.where(mask, -0.5, torch.finfo(torch.float32).min)
    with pytest.raises(AttnCoreError, match="attention mask"):
        under(OURS, model, lambda m: m(input_ids=ids, attention_mask=mask))
    agree(model, padded)


def test_caches_of_another_form_are_refused():
    with pytest.raises(AttnCoreError, match="kv_cache_dtype"):
        hf.attach(BY_NAME["llama"].make(), kv_cache_dtype="fp8_e4m3")


def test_layers_are_told_apart_or_refused():
    model = BY_NAME["gpt_oss"].make()
    attn = hf.attach(model)
    owner = hf_models.owner_of(model.model.layers[0].self_attn)
    names = [
        owner.layer(layer.self_attn, torch.float32, torch.device("cpu"), None).group.name
        for layer in model.model.layers
    ]
    assert names == ["sliding", "full"] * 2
    assert names == [attn.group_of(i).name for i in range(4)]
    stray = model.model.layers[0].self_attn
    stray.layer_idx = None
    bound = owner.bound(model.config, torch.float32, torch.device("cpu"))
    with pytest.raises(AttnCoreError, match="does not tell its group"):
        bound.layer(stray, True)
