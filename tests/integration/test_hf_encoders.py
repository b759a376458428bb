"""Encoders of transformers on our kernels: windows, paddings, dtypes; and everything that must be refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
)

from attn_core import AttnCoreError, BadInputError, NoBackendError
from attn_core.integrations import hf_models
from attn_core.integrations import transformers as hf

LENS = (19, 7, 23, 1)
SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 3}


def randomised(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15, generator=generator)
    return model.eval()


def modernbert(local_attention: int = 10) -> torch.nn.Module:
    """Windows shorter than the sequences: layers full, sliding, sliding, full."""
    config = ModernBertConfig(
        **SIZES, num_hidden_layers=4, local_attention=local_attention, attn_implementation="eager", pad_token_id=0
    )
    return randomised(ModernBertModel(config))


def bert(**changes: object) -> torch.nn.Module:
    return randomised(BertModel(BertConfig(**SIZES, num_hidden_layers=2, attn_implementation="eager", **changes)))


def batch(side: str) -> dict[str, Tensor]:
    longest = max(LENS)
    place = torch.arange(longest)
    lens = torch.tensor(LENS)[:, None]
    keep = place < lens if side == "right" else place >= longest - lens
    ids = torch.randint(1, 61, keep.shape, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids * keep, "attention_mask": keep.long()}


@torch.inference_mode()
def hidden(model: torch.nn.Module, implementation: str, **inputs: Tensor) -> Tensor:
    model.set_attn_implementation(implementation)
    return model(**inputs).last_hidden_state


@pytest.fixture(autouse=True)
def _registered():
    hf.register()


# what is right --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [modernbert, bert])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_eager_on_real_tokens(make, side):
    model, inputs = make(), batch(side)
    keep = inputs["attention_mask"].bool()
    eager = hidden(model, "eager", **inputs)
    got = hidden(model, hf.NAME, **inputs)
    torch.testing.assert_close(got[keep], eager[keep], atol=2e-5, rtol=1e-4)
    unpadded = {"input_ids": inputs["input_ids"][2:3]}
    torch.testing.assert_close(
        hidden(model, hf.NAME, **unpadded), hidden(model, "eager", **unpadded), atol=2e-5, rtol=1e-4
    )


def test_windows_are_the_models_and_one_off_would_show():
    attn = hf.attach(modernbert(10))
    assert {n: g.spec.sliding_window for n, g in attn.groups.items()} == {"full": None, "sliding": 6}
    inputs = batch("right")
    keep = inputs["attention_mask"].bool()
    off = hidden(modernbert(8), "eager", **inputs) - hidden(modernbert(10), hf.NAME, **inputs)
    assert off[keep].abs().max() > 1e-2


def test_masks_made_by_the_caller_are_read_too():
    """4-D masks go past the mask function: bool, and floats with any large negative number."""
    model, inputs = bert(), batch("left")
    keep = inputs["attention_mask"].bool()
    eager = hidden(model, "eager", **inputs)
    whole = keep[:, None, None].expand(-1, 1, keep.shape[1], -1)
    for mask in (whole, torch.where(whole, 0.0, -torch.inf), torch.where(whole, 0.0, torch.finfo(torch.float32).min)):
        got = hidden(model, hf.NAME, input_ids=inputs["input_ids"], attention_mask=mask)
        torch.testing.assert_close(got[keep], eager[keep], atol=2e-5, rtol=1e-4)


def test_a_mask_changed_in_place_is_read_again():
    model, inputs = bert(), batch("right")
    keep = inputs["attention_mask"].bool()
    mask = torch.ones(len(LENS), 1, max(LENS), max(LENS), dtype=torch.bool)
    hidden(model, hf.NAME, input_ids=inputs["input_ids"], attention_mask=mask)
    mask.copy_(keep[:, None, None])
    got = hidden(model, hf.NAME, input_ids=inputs["input_ids"], attention_mask=mask)
    torch.testing.assert_close(got[keep], hidden(model, "eager", **inputs)[keep], atol=2e-5, rtol=1e-4)


def test_sequences_without_any_token_do_not_disturb_the_others():
    model, inputs = bert(), batch("right")
    inputs["attention_mask"][1] = 0
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        hidden(model, hf.NAME, **inputs)[keep], hidden(model, "eager", **inputs)[keep], atol=2e-5, rtol=1e-4
    )
    inputs["attention_mask"][:] = 0
    assert hidden(model, hf.NAME, **inputs).isfinite().all()


def test_another_dtype_is_another_decision():
    model, inputs = bert(), batch("right")
    keep = inputs["attention_mask"].bool()
    first = hf.attach(model)
    eager = hidden(model, "eager", **inputs)
    model.to(torch.bfloat16)
    got = hidden(model, hf.NAME, **inputs)
    owner = hf_models.owner_of(model.encoder.layer[0].attention.self)
    bound = owner.bound(model.config, torch.bfloat16, torch.device("cpu")).backend
    assert [b.decision.model.groups["encoder"].dtype for b in (first, bound)] == ["float32", "bfloat16"]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[keep].float(), eager[keep], atol=0.2, rtol=0.1)


def test_threads_do_not_mix_their_batches():
    model = modernbert()
    hf.attach(model)
    batches = [{k: v[: 1 + i % 4] for k, v in batch(side).items()} for i, side in enumerate(["left", "right"] * 8)]

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(**inputs).last_hidden_state

    alone = [run(b) for b in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_attach_takes_engine_options():
    attn = hf.attach(bert(), deterministic=True, backend="torch_native")
    assert attn.decision.options.deterministic
    with pytest.raises(BadInputError, match="unknown option 'determinstic'"):
        hf.attach(bert(), determinstic=True)


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["hole", "extra", "packed", "bias", "heads"])
def test_masks_that_say_more_than_padding_are_refused(entry):
    model, ids = bert(), batch("right")["input_ids"]
    n = ids.shape[1]
    mask = torch.ones(len(ids), 3 if entry == "heads" else 1, n, n, dtype=torch.bool)
    if entry == "hole":
        mask[1, :, :, 4] = False
    elif entry == "extra":
        mask[2, :, 3, 9] = False
    elif entry == "packed":
        half = torch.arange(n) < 9
        mask[:] = half[:, None] == half
    elif entry == "bias":
        mask = torch.where(mask, -0.5, 0.0)
    with pytest.raises(AttnCoreError, match="attention mask"):
        hidden(model, hf.NAME, input_ids=ids, attention_mask=mask)


def call(model: torch.nn.Module, **kwargs: object) -> tuple[Tensor, None]:
    """One layer's call as transformers makes it, with more keywords."""
    q = torch.randn(2, 3, 5, 16)
    return hf.attention(model.encoder.layer[0].attention.self, q, q, q, None, scaling=0.25, **kwargs)


def test_keywords_are_known_or_refused_by_name():
    model = bert()
    call(model, position_ids=torch.arange(5)[None], use_cache=False, s_aux=None, anything=None, sliding_window=None)
    with pytest.raises(BadInputError, match="'s_aux'"):
        call(model, s_aux=torch.zeros(3))
    with pytest.raises(BadInputError, match="'brand_new'"):
        call(model, brand_new=0)
    with pytest.raises(BadInputError, match="sliding_window=4"):
        call(model, sliding_window=4)
    with pytest.raises(BadInputError, match=r"softcap=50\.0"):
        call(model, softcap=50.0)
    with pytest.raises(BadInputError, match="the layer is causal"):
        call(model, is_causal=True)
    with pytest.raises(BadInputError, match="output_attentions=True"):
        call(model, output_attentions=True)
    with pytest.raises(AttnCoreError, match=r"dropout=0\.1"):
        call(model, dropout=0.1)


def test_calls_that_contradict_the_config_are_refused():
    module = bert().encoder.layer[0].attention.self
    q, wide = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 32)
    with pytest.raises(BadInputError, match=r"scales by 1\.0"):
        hf.attention(module, q, q, q, None, scaling=1.0)
    with pytest.raises(BadInputError, match="heads, width"):
        hf.attention(module, q, q, wide, None)
    with pytest.raises(AttnCoreError, match="5 queries over 4 keys in an encoder layer"):
        hf.attention(module, q, q[:, :, :4], q[:, :, :4], None)
    module.is_causal = True
    with pytest.raises(BadInputError, match="causal"):
        hf.attention(module, q, q, q, None)


def test_gradients_are_refused_instead_of_missing():
    model, inputs = bert(), batch("right")
    model.set_attn_implementation(hf.NAME)
    with pytest.raises(AttnCoreError, match="no backward"):
        model(**inputs).last_hidden_state.sum().backward()


def test_register_installs_the_attention_only_after_the_self_check(monkeypatch):
    from transformers import AttentionInterface, AttentionMaskInterface

    monkeypatch.setattr(AttentionInterface, "_global_mapping", {})
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", {})
    check = hf.self_check
    with monkeypatch.context() as patch:
        patch.setattr(hf, "self_check", lambda: check(tolerance=-1.0))
        with pytest.raises(AttnCoreError, match="off by"):
            hf.register()
    assert hf.NAME not in AttentionInterface._global_mapping
    hf.register()
    assert AttentionInterface._global_mapping[hf.NAME] is hf.attention
    assert AttentionMaskInterface._global_mapping[hf.NAME] is hf.mask


def test_self_check_sees_a_mask_that_nobody_asked_for(monkeypatch):
    from transformers import AttentionMaskInterface

    mapping = {k: v for k, v in AttentionMaskInterface._global_mapping.items() if k != hf.NAME}
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", mapping)
    with pytest.raises(AttnCoreError, match="did not ask"):
        hf.self_check()


def test_a_refusal_leaves_the_model_as_it_was():
    model = bert()
    with pytest.raises(NoBackendError, match="nobody"):
        hf.attach(model, backend="nobody")
    assert model.config._attn_implementation == "eager"
