"""The stand-in for SGLang's wave wrappers does what they do: one test per quirk of its contract."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch

from simulators import rocm_wave
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed

FACTS = Contract.load("sglang_wave")
HEADS, SPLITS = 4, 8


@pytest.fixture
def wave():
    """Every function of the contract by its last name."""
    with installed(rocm_wave.stand_in()):
        parts = [name.rpartition(".") for name in FACTS.functions]
        yield {leaf: getattr(importlib.import_module(module), leaf) for module, _, leaf in parts}


def half(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def decode(**more):
    """Two rows over 3 and 5 of 20 tokens."""
    return {
        "q": half(2, HEADS, 64), "k_buffer": half(20, 2, 64, seed=1), "v_buffer": half(20, 2, 64, seed=2),
        "o": torch.zeros(2, HEADS, 64).bfloat16(), "b_req_idx": ints(0, 3, 8),
        "req_to_token": ints(4, 9, 1, 7, 3, 2, 8, 6), "attn_logits": torch.empty(SPLITS, 2, HEADS, 64),
        "attn_logits_max": torch.empty(SPLITS, 2, HEADS), "num_kv_splits": ints(4, 4), "max_kv_splits": SPLITS,
        "sm_scale": 0.125, **more,
    }  # fmt: skip


def extend(**more):
    """Rows of 2 and 3 new tokens behind 3 and 0 cached ones."""
    return {
        "q_extend": half(5, HEADS, 64), "k_extend": half(5, 2, 64, seed=3), "v_extend": half(5, 2, 64, seed=4),
        "k_buffer": half(20, 2, 64, seed=1), "v_buffer": half(20, 2, 64, seed=2), "qo_indptr": ints(0, 2, 5),
        "kv_indptr": ints(0, 3, 3), "kv_indices": ints(4, 9, 1), "custom_mask": None, "mask_indptr": None,
        "max_seq_len": 3, "output": torch.zeros(5, HEADS, 64).bfloat16(), **more,
    }  # fmt: skip


def decoded(wave, **more):
    given = decode(**more)
    wave["decode_attention_fwd"](**given)
    return given["o"]


def extended(wave, **more):
    given = extend(**more)
    wave["extend_attention_wave"](**given)
    return given["output"]


def test_every_quirk_has_a_test():
    assert {f"test_quirk_{name}" for name in FACTS.quirks} == {n for n in globals() if n.startswith("test_quirk_")}


def test_decode_and_extend_agree(wave):
    """One new token behind cached ones is what decode computes with that token in the cache."""
    given = decode()
    k, v = given["k_buffer"], given["v_buffer"]
    one = extended(
        wave, q_extend=given["q"], k_extend=k[[1, 6]], v_extend=v[[1, 6]], qo_indptr=ints(0, 1, 2),
        kv_indptr=ints(0, 2, 6), kv_indices=ints(4, 9, 7, 3, 2, 8), max_seq_len=1,
        output=torch.zeros(2, HEADS, 64).bfloat16(),
    )  # fmt: skip
    assert torch.equal(one, decoded(wave))


def test_quirk_decode_ignores_the_scale(wave):
    assert torch.equal(decoded(wave, sm_scale=9.0), decoded(wave))


def test_quirk_decode_ignores_the_number_of_splits(wave):
    assert torch.equal(decoded(wave, num_kv_splits=None), decoded(wave))
    with pytest.raises(Misuse, match="scratch"):
        decoded(wave, max_kv_splits=4)


def test_quirk_extend_scale_has_a_default(wave):
    assert torch.equal(extended(wave, layer_scaling=0.0), extended(wave))
    assert torch.equal(extended(wave, layer_scaling=0.125), extended(wave))
    assert not torch.equal(extended(wave, layer_scaling=0.3), extended(wave))


def test_quirk_extend_reads_new_keys_from_memory(wave):
    other = extended(wave, k_extend=half(5, 2, 64, seed=9))
    assert not torch.equal(other, extended(wave))
    with pytest.raises(Misuse, match="new keys"):
        extended(wave, k_extend=half(8, 2, 64), v_extend=half(8, 2, 64))


def test_quirk_extend_ignores_masks(wave):
    nothing = torch.zeros(99, dtype=torch.uint8)
    assert torch.equal(extended(wave, custom_mask=nothing, mask_indptr=ints(0, 10, 19)), extended(wave))


def test_quirk_copies_do_not_live_until_the_launch(wave):
    with pytest.raises(Misuse, match="copy"):
        decoded(wave, q=half(HEADS, 2, 64).transpose(0, 1))
    with pytest.raises(Misuse, match="copy"):
        extended(wave, k_buffer=half(20, 2, 128)[..., :64])


def test_quirk_output_that_is_not_contiguous_is_lost(wave):
    assert not decoded(wave, o=torch.zeros(HEADS, 2, 64).bfloat16().transpose(0, 1)).any()
    assert decoded(wave).any()


def test_quirk_launches_on_the_current_device(monkeypatch):
    from simulators.fake_device import devices

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index, expected in ((0, nullcontext()), (1, pytest.raises(Misuse, match="launched on device 0"))):
        with devices("cuda"), expected:
            rocm_wave._launched("f", torch.device(f"cuda:{index}"), q=torch.zeros(2, device=f"cuda:{index}"))


def test_quirk_nothing_is_returned(wave):
    assert wave["decode_attention_fwd"](**decode()) is None
    assert wave["extend_attention_wave"](**extend()) is None


def test_quirk_reads_end_at_two_gibibytes(wave, monkeypatch):
    monkeypatch.setattr(rocm_wave, "MOST_BYTES", 20 * 2 * 64 * 2)
    for call in (decoded, extended):
        with pytest.raises(Misuse, match="zeros"):
            call(wave)


def test_limits(wave):
    for more in ({"q": half(2, 6, 64)}, {"q": half(2, HEADS, 80)}, {"b_req_idx": torch.tensor([0, 3, 8])}):
        with pytest.raises(Refused):
            decoded(wave, **more)
    with pytest.raises(Misuse, match="longest"):
        extended(wave, max_seq_len=2)
