"""The stand-in for AITER does what AITER does: one test per quirk of its contract."""

from __future__ import annotations

import importlib

import pytest
import torch

from simulators import rocm_aiter
from simulators.contract import Contract, Misuse
from simulators.standin import installed

QUIRKS = Contract.load("aiter").quirks


@pytest.fixture
def aiter():
    """Every function of the contract by its last name."""
    with installed(rocm_aiter.stand_in()):
        names = Contract.load("aiter").functions
        yield {
            n.rpartition(".")[2]: getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2])
            for n in names
        }


def half(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def ragged(**more):
    return {
        "q": half(9, 4, 64), "k": half(9, 2, 64, seed=1), "v": half(9, 2, 64, seed=2), "cu_seqlens_q": ints(0, 3, 9),
        "cu_seqlens_k": ints(0, 3, 9), "max_seqlen_q": 6, "max_seqlen_k": 6, "softmax_scale": 0.2, **more,
    }  # fmt: skip


def batch(**more):
    """Rows of 2 and 3 queries over 5 and 20 keys in pages of 16."""
    return {
        "q": half(5, 4, 64), "k": half(5, 16, 2, 64, seed=1), "v": half(5, 16, 2, 64, seed=2),
        "cu_seqlens_q": ints(0, 2, 5), "kv_indptr": ints(0, 1, 3), "kv_page_indices": ints(4, 2, 1), "max_seqlen_q": 3,
        "max_seqlen_k": 20, "kv_last_page_lens": ints(5, 4), "softmax_scale": 0.2, "causal": True, **more,
    }  # fmt: skip


def unified(**more):
    given = {
        "q": half(5, 4, 64), "k": half(5, 16, 2, 64, seed=1), "v": half(5, 16, 2, 64, seed=2), "out": half(5, 4, 64),
        "cu_seqlens_q": ints(0, 2, 5), "max_seqlen_q": 3, "seqused_k": ints(5, 20), "max_seqlen_k": 20,
        "softmax_scale": 0.2, "causal": True, "window_size": (-1, -1), "block_table": ints(4, 0, 2, 1).view(2, 2),
        "softcap": 0.0, "q_descale": None, "k_descale": None, "v_descale": None,
    }  # fmt: skip
    return {**given, **more}


def decode(**more):
    given = {
        "out": half(2, 4, 64), "workspace_buffer": torch.zeros(1 << 16, dtype=torch.uint8), "query": half(2, 4, 64),
        "key_cache": half(5, 16, 2, 64, seed=1), "value_cache": half(5, 16, 2, 64, seed=2), "scale": 0.2,
        "block_tables": ints(4, 0, 2, 1).view(2, 2), "cu_query_lens": ints(0, 1, 2), "context_lens": ints(5, 20),
        "max_context_len": 20, "alibi_slopes": None, "kv_cache_dtype": "auto", "kv_cache_layout": "NHD",
        "logits_soft_cap": 0.0, "k_scale": torch.ones(()), "v_scale": torch.ones(()),
    }  # fmt: skip
    return {**given, **more}


def mla(**more):
    given = {
        "q": half(2, 16, 576), "kv_buffer": half(30, 1, 1, 576, seed=1), "o": half(2, 16, 512),
        "qo_indptr": ints(0, 1, 2), "kv_indptr": ints(0, 3, 8), "kv_indices": ints(*range(1, 9)),
        "kv_last_page_lens": ints(1, 1), "max_seqlen_q": 1, "sm_scale": 0.1,
    }  # fmt: skip
    return {**given, **more}


def test_every_quirk_has_a_test():
    assert {f"test_quirk_{name}" for name in QUIRKS} == {n for n in globals() if n.startswith("test_quirk_")}


def test_quirk_window_of_one_is_none(aiter):
    none = aiter["mha_batch_prefill_func"](**batch())
    assert torch.equal(aiter["mha_batch_prefill_func"](**batch(window_size=(0, 0))), none)
    assert not torch.equal(aiter["mha_batch_prefill_func"](**batch(window_size=(1, 0))), none)


def test_quirk_varlen_window_has_three(aiter):
    with pytest.raises(RuntimeError, match="three entries"):
        aiter["flash_attn_varlen_func"](**ragged(window_size=(-1, -1)))


def test_quirk_varlen_default_scale(aiter):
    a = aiter["flash_attn_varlen_func"](**ragged(softmax_scale=None))
    assert torch.equal(a, aiter["flash_attn_varlen_func"](**ragged(softmax_scale=64**-0.5)))


def test_quirk_decode_out_is_filled(aiter):
    given = decode()
    assert torch.ops.aiter.paged_attention_v1(*given.values()) is given["out"]
    with pytest.raises(ValueError, match="bytes"):
        aiter["paged_attention_v1"](**decode(workspace_buffer=torch.zeros(64, dtype=torch.uint8)))


def test_quirk_decode_goes_by_shape(aiter):
    given = decode()
    for name in ("query", "out"):
        wide = torch.cat((given[name], given[name]), -1)[..., : given[name].shape[-1]]
        with pytest.raises(Misuse, match="strides"):
            aiter["paged_attention_v1"](**{**given, name: wide})
    rows = torch.cat((given["query"], given["query"]), 1)[:, : given["query"].shape[1]]
    aiter["paged_attention_v1"](**{**given, "query": rows})


def test_quirk_decode_knows_no_sinks(aiter):
    parameters = Contract.load("aiter").functions[rocm_aiter.DECODE].signature.parameters
    assert not [p for p in parameters if "sink" in p or "lse" in p]


def test_quirk_unified_is_causal(aiter):
    with pytest.raises(AssertionError, match="causal"):
        aiter["unified_attention"](**unified(causal=False))


def test_quirk_unified_window_counts_itself(aiter):
    """Two keys with (1, 0): a query sees itself and the one before."""
    given = unified(window_size=(1, 0))
    aiter["unified_attention"](**given)
    last = given["out"][1].clone()  # the second query of row 0, at position 4 of 5: keys 3 and 4
    k, v = given["k"].clone(), given["v"].clone()
    k[4, :3], v[4, :3] = 9.0, 9.0
    again = unified(window_size=(1, 0), k=k, v=v)
    aiter["unified_attention"](**again)
    assert torch.equal(again["out"][1], last)


def test_quirk_unified_reads_one_scale(aiter):
    fp8 = {n: unified()[n].to(torch.float8_e4m3fnuz) for n in ("k", "v")}
    one = torch.full((2, 2), 0.5)
    many = torch.tensor([[0.5, 9.0], [9.0, 9.0]])
    a, b = (unified(**fp8, k_descale=d, v_descale=d) for d in (one, many))
    for given in (a, b):
        aiter["unified_attention"](**given)
    assert torch.equal(a["out"], b["out"])
    with pytest.raises(Misuse, match="descales"):
        aiter["unified_attention"](**unified(**fp8))


def test_quirk_mla_returns_scratch_first(aiter):
    given = mla(return_lse=True)
    scratch, lse = aiter["mla_decode_fwd"](**given)
    assert scratch.isnan().all()
    assert lse.shape == (2, 16)
    assert given["o"].isfinite().all()
    assert aiter["mla_decode_fwd"](**mla())[1] is None


def test_quirk_mla_row_zero(aiter):
    rows = mla()["kv_buffer"]
    rows[0] = float("nan")
    given = mla(kv_buffer=rows)
    aiter["mla_decode_fwd"](**given)
    assert given["o"].isnan().all()


def test_quirk_mla_wants_contiguous_q(aiter):
    with pytest.raises(Misuse, match="contiguous"):
        aiter["mla_decode_fwd"](**mla(q=half(16, 2, 576).transpose(0, 1)))


def extend(**more):
    """Rows of 2 and 3 queries over 3 and 5 keys."""
    given = mla(q=half(5, 16, 576), o=half(5, 16, 512), qo_indptr=ints(0, 2, 5), max_seqlen_q=3)
    return {**given, **more}


def test_quirk_mla_prefill_is_causal(aiter):
    """The first query of a row does not see the row's last key, the last one does."""
    given, again = extend(), extend()
    again["kv_buffer"][8] = 3.0  # the last key of the second row
    for call in (given, again):
        aiter["mla_prefill_fwd"](**call)
    assert torch.equal(given["o"][:4], again["o"][:4])
    assert not torch.equal(given["o"][4], again["o"][4])
    assert "causal" not in Contract.load("aiter").functions[rocm_aiter.MLA_PREFILL].signature.parameters


def test_quirk_mla_prefill_fills_o(aiter):
    given = extend()
    out, lse = aiter["mla_prefill_fwd"](**given)
    assert out is given["o"]
    assert lse.shape == (5, 1, 16, 1)
    with pytest.raises(Misuse, match="contiguous"):
        aiter["mla_prefill_fwd"](**extend(o=half(16, 5, 512).transpose(0, 1)))
    for heads in (8, 32):
        with pytest.raises(RuntimeError, match="head"):
            aiter["mla_prefill_fwd"](**extend(q=half(5, heads, 576), o=half(5, heads, 512)))


def test_quirk_batch_prefill_lse_heads_first(aiter):
    out, lse = aiter["mha_batch_prefill_func"](**batch(return_lse=True))
    assert (out.shape, lse.shape) == ((5, 4, 64), (4, 5))
