"""The stand-in for MATE does what MATE does: one test per quirk of its contract."""

from __future__ import annotations

import importlib

import pytest
import torch

from simulators import musa_mate
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed

QUIRKS = Contract.load("mate").quirks


@pytest.fixture
def mha():
    with installed(musa_mate.stand_in()):
        yield importlib.import_module("mate.mha_interface")


@pytest.fixture
def mla():
    with installed(musa_mate.stand_in()):
        yield importlib.import_module("mate.flashmla")


def half(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def paged(heads=4, kv_heads=2, width=64, **more):
    """Two sequences, one new token each, 5 and 70 keys in pages of 64."""
    k, v = half(5, 64, kv_heads, width, seed=1), half(5, 64, kv_heads, width, seed=2)
    return {
        "q": half(2, heads, width), "k_cache": k, "v_cache": v, "cache_seqlens": ints(5, 70), "max_seqlen_q": 1,
        "page_table": ints(1, 0, 2, 3).view(2, 2), "cu_seqlens_q": ints(0, 1, 2), "causal": True, **more,
    }  # fmt: skip


def ragged(heads=4, kv_heads=2, width=64, **more):
    return {
        "q": half(9, heads, width), "k": half(9, kv_heads, width, seed=1), "v": half(9, kv_heads, width, seed=2),
        "cu_seqlens_q": ints(0, 3, 9), "cu_seqlens_k": ints(0, 3, 9), "max_seqlen_q": 6, "max_seqlen_k": 6,
        "backend": "mutlass", **more,
    }  # fmt: skip


def schedule(mha, **more):
    return mha.get_scheduler_metadata(2, 1, 70, 4, 2, 64, seqused_k=ints(5, 70), causal=True, **more)


def test_every_quirk_has_a_test():
    assert {f"test_quirk_{name}" for name in QUIRKS} == {n for n in globals() if n.startswith("test_quirk_")}


def test_quirk_metadata_on_current_device(mha):
    assert schedule(mha).device.type == "cpu"  # plugins_musa/test_musa_device.py: on two devices


def test_quirk_metadata_adds_k_new(mha):
    made = schedule(mha, cu_seqlens_k_new=ints(0, 5, 75))
    assert not torch.equal(made, schedule(mha))
    with pytest.raises(Misuse, match="another call"):
        mha.flash_attn_with_kvcache(**paged(scheduler_metadata=made))


def test_quirk_sinks_drop_metadata(mha):
    wrong = ints(1, 2, 3)
    sinks = {"learnable_sink": half(4, seed=3)}
    got = mha.flash_attn_with_kvcache(**paged(scheduler_metadata=wrong, **sinks))
    assert torch.equal(got, mha.flash_attn_with_kvcache(**paged(**sinks)))
    with pytest.raises(Misuse):
        mha.flash_attn_with_kvcache(**paged(scheduler_metadata=wrong))


def test_quirk_lse_includes_sinks(mha):
    _, plain, *_ = mha.flash_attn_with_kvcache(**paged(return_softmax_lse=True))
    sinks = half(4, seed=3)
    _, lse, *_ = mha.flash_attn_with_kvcache(**paged(return_softmax_lse=True, learnable_sink=sinks))
    torch.testing.assert_close(lse, torch.logaddexp(plain, sinks.float()[:, None]))


def test_quirk_kvcache_returns_four(mha):
    assert len(mha.flash_attn_with_kvcache(**paged(return_softmax_lse=True))) == 4
    assert len(mha.flash_attn_with_kvcache(**latent(return_softmax_lse=True))) == 2
    assert isinstance(mha.flash_attn_with_kvcache(**paged()), torch.Tensor)


def test_quirk_varlen_returns_two(mha):
    out, lse = mha.flash_attn_varlen_func(**ragged(return_softmax_lse=True))
    assert (out.shape, lse.shape) == ((9, 4, 64), (4, 9))


def test_quirk_max_seqlen_q_is_needed(mha):
    with pytest.raises(AssertionError) as e:
        mha.flash_attn_with_kvcache(**paged(max_seqlen_q=None))
    assert str(e.value) == ""


def test_quirk_wide_heads_round_down(mha):
    with pytest.raises(Misuse, match="512"):
        mha.flash_attn_with_kvcache(**paged(width=576))
    with pytest.raises(Refused, match="rounded_pair"):
        mha.flash_attn_varlen_func(**ragged(v=half(9, 2, 256), width=128))


def test_quirk_mubin_drops_right_window(mha):
    call = ragged(window_size=(-1, 0))
    full = mha.flash_attn_varlen_func(**ragged())
    assert torch.equal(mha.flash_attn_varlen_func(**{**call, "backend": "mubin"}), full)
    causal = mha.flash_attn_varlen_func(**ragged(causal=True))
    assert torch.equal(mha.flash_attn_varlen_func(**call), causal)
    with pytest.raises(Misuse, match="auto"):
        mha.flash_attn_varlen_func(**{**call, "backend": "auto"})


def test_quirk_mubin_skips_head_check(mha):
    with pytest.raises(Refused, match="divisible"):
        mha.flash_attn_varlen_func(**ragged(heads=5, kv_heads=2))


def latent(workspace=None, ready=False, **more):
    rows = half(5, 64, 1, 576, seed=1)
    workspace = torch.zeros(1 << 20, dtype=torch.uint8) if workspace is None else workspace
    return paged(
        q=half(2, 4, 64), qv=half(2, 4, 512, seed=4), k_cache=rows[..., 512:], v_cache=rows[..., :512],
        scheduler_metadata=(workspace, ready), **more,
    )  # fmt: skip


def test_quirk_latent_workspace_is_one_steps(mha):
    workspace = torch.zeros(1 << 20, dtype=torch.uint8)
    first = mha.flash_attn_with_kvcache(**latent(workspace))
    assert torch.equal(mha.flash_attn_with_kvcache(**latent(workspace, True)), first)
    with pytest.raises(Misuse, match="another call"):
        mha.flash_attn_with_kvcache(**{**latent(workspace, True), "cache_seqlens": ints(6, 71)})
    with pytest.raises(Refused, match="workspace"):
        mha.flash_attn_with_kvcache(**{**latent(), "scheduler_metadata": None})


@pytest.mark.parametrize("ignored", [{"window_size": (3, 0)}, {"softcap": 2.0}, {"num_splits": 2}], ids=str)
def test_quirk_latent_ignores(mha, ignored):
    with pytest.raises(Misuse, match=next(iter(ignored))):
        mha.flash_attn_with_kvcache(**latent(**ignored))


def test_quirk_flashmla_lse_queries_first(mla):
    cache, lengths, table = half(5, 64, 1, 576), ints(5, 70), ints(1, 0, 2, 3).view(2, 2)
    tiles, splits = mla.get_mla_metadata(lengths, 3 * 4, 1, 4)
    out, lse = mla.flash_mla_with_kvcache(half(2, 3, 4, 576), cache, table, lengths, 512, tiles, splits, causal=True)
    assert (out.shape, lse.shape) == ((2, 3, 4, 512), (2, 3, 4))
    with pytest.raises(Misuse, match="another call"):
        mla.flash_mla_with_kvcache(half(2, 3, 4, 576), cache, table, lengths + 1, 512, tiles, splits, causal=True)
