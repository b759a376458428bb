"""The stand-in of sglang-kernel's FlashAttention-3: its quirks, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from simulators import cuda_fa3
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed

PAGE = 4


@pytest.fixture
def fa3():
    import importlib

    with installed(cuda_fa3.stand_in()):
        yield importlib.import_module("sgl_kernel.flash_attn")


def paged(dtype=torch.bfloat16, d=64, dv=64, heads=4):
    """q of two decode rows and one of three queries; keys in pages."""
    g = torch.Generator().manual_seed(0)
    cache = [torch.randn(9, PAGE, 2, w, generator=g).to(dtype) for w in (d, dv)]
    given = {
        "cache_seqlens": torch.tensor([5, 9, 7], dtype=torch.int32),
        "page_table": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 7, 0]], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 2, 5], dtype=torch.int32),
        "max_seqlen_q": 3,
        "causal": True,
    }
    return torch.randn(5, heads, d, generator=g).to(dtype), *cache, given


def test_every_quirk_has_a_test():
    assert {n[11:] for n in globals() if n.startswith("test_quirk_")} == set(Contract.load("sgl_kernel_fa3").quirks)


def test_quirk_returns_rest(fa3):
    q, k, v, given = paged()
    assert len(fa3.flash_attn_with_kvcache(q, k, v, **given, return_softmax_lse=True)) == 4
    assert isinstance(fa3.flash_attn_with_kvcache(q, k, v, **given), torch.Tensor)


def test_quirk_lse_heads_first(fa3):
    q, k, v, given = paged()
    _, lse, *_ = fa3.flash_attn_with_kvcache(q, k, v, **given, return_softmax_lse=True)
    assert lse.shape == (4, 5)
    row = torch.cat([k[1], k[2]])[:5].float()  # the first sequence has five keys
    want = torch.logsumexp(row[:, 0] @ q[0, 0].float() / 8, 0)
    assert lse[0, 0] == pytest.approx(float(want), abs=1e-4)
    batched = {"cache_seqlens": given["cache_seqlens"], "page_table": given["page_table"], "causal": True}
    out, lse, *_ = fa3.flash_attn_with_kvcache(q[:3, None], k, v, **batched, return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((3, 1, 4, 64), (3, 4, 1))


def test_quirk_default_scale_counts_qv(fa3):
    q, k, v, given = paged(dv=512)
    qv = torch.randn(5, 4, 512).bfloat16()
    default = fa3.flash_attn_with_kvcache(q, k, v, qv=qv, **given)
    assert torch.equal(default, fa3.flash_attn_with_kvcache(q, k, v, qv=qv, **given, softmax_scale=576**-0.5))
    assert not torch.equal(default, fa3.flash_attn_with_kvcache(q, k, v, qv=qv, **given, softmax_scale=64**-0.5))


def test_quirk_chunk_none(fa3):
    q, k, v, given = paged()
    results = [fa3.flash_attn_with_kvcache(q, k, v, **given, attention_chunk=c) for c in (None, 0, 4)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def metadata(fa3, given, **changed):
    made = {
        "batch_size": 3, "max_seqlen_q": 3, "max_seqlen_k": 3 * PAGE, "num_heads": 4, "num_heads_k": 2, "headdim": 64,
        "cache_seqlens": given["cache_seqlens"], "page_size": PAGE, "causal": True, **changed,
    }  # fmt: skip
    return fa3.get_scheduler_metadata(**made)


def test_quirk_metadata_is_of_one_call(fa3):
    q, k, v, given = paged()
    right = fa3.flash_attn_with_kvcache(q, k, v, **given, scheduler_metadata=metadata(fa3, given))
    assert torch.equal(right, fa3.flash_attn_with_kvcache(q, k, v, **given))
    longer = torch.cat((metadata(fa3, given), torch.zeros(5, dtype=torch.int32)))
    fa3.flash_attn_with_kvcache(q, k, v, **given, scheduler_metadata=longer)
    others = (
        {"num_heads": 8},
        {"window_size": (3, 0)},
        {"num_splits": 1},
        {"cache_seqlens": given["cache_seqlens"] - 1},
    )
    for other in others:
        with pytest.raises(Misuse, match="another call"):
            fa3.flash_attn_with_kvcache(q, k, v, **given, scheduler_metadata=metadata(fa3, given, **other))


def test_quirk_longest_is_what_the_table_holds(fa3):
    q, k, v, given = paged()
    made = metadata(fa3, given, max_seqlen_k=9)  # the longest of these three
    with pytest.raises(Misuse, match="another call"):
        fa3.flash_attn_with_kvcache(q, k, v, **given, scheduler_metadata=made)


def test_quirk_k_new_counted_by_metadata_only(fa3):
    q, k, v, given = paged()
    new = torch.tensor([0, 1, 2, 5], dtype=torch.int32)
    fa3.flash_attn_with_kvcache(q, k, v, **given, cu_seqlens_k_new=new)
    made = metadata(fa3, given, cu_seqlens_k_new=new)
    with pytest.raises(Misuse):
        fa3.flash_attn_with_kvcache(q, k, v, **given, cu_seqlens_k_new=new, scheduler_metadata=made)


def test_quirk_fp8_needs_fp8_q(fa3):
    q, k, v, given = paged()
    fp8 = [t.to(torch.float8_e4m3fn) for t in (q, k, v)]
    assert fa3.flash_attn_with_kvcache(*fp8, **given).dtype == torch.bfloat16
    with pytest.raises(Refused, match="same dtype"):
        fa3.flash_attn_with_kvcache(q, *fp8[1:], **given)


REFUSED = {
    "float32": lambda q, k, v, g: ((q.float(), k.float(), v.float()), g),
    "mixed dtypes": lambda q, k, v, g: ((q.half(), k, v), g),
    "int64 lengths": lambda q, k, v, g: ((q, k, v), {**g, "cache_seqlens": g["cache_seqlens"].long()}),
    "lengths of the wrong shape": lambda q, k, v, g: ((q, k, v), {**g, "cache_seqlens": g["cache_seqlens"][:2]}),
    "float32 sinks": lambda q, k, v, g: ((q, k, v), {**g, "sinks": torch.zeros(4)}),
    "sinks of other heads": lambda q, k, v, g: ((q, k, v), {**g, "sinks": torch.zeros(2).bfloat16()}),
    "longest as a tensor": lambda q, k, v, g: ((q, k, v), {**g, "max_seqlen_q": torch.tensor(3)}),
    "too many splits": lambda q, k, v, g: ((q, k, v), {**g, "num_splits": 1000}),
    "heads that do not divide": lambda q, k, v, g: ((q[:, :3], k, v), g),
    "a width of 12": lambda q, k, v, g: ((q[..., :12], k[..., :12], v[..., :12]), g),
    "strided rows": lambda q, k, v, g: ((q[..., ::2], k[..., :32], v[..., :32]), g),
    "too short a grid": lambda q, k, v, g: ((q, k, v), {**g, "max_seqlen_q": 2}),
    "offsets that leave queries over": lambda q, k, v, g: ((torch.cat((q, q)), k, v), g),
    "keys outside their pages": lambda q, k, v, g: ((q, k, v), {**g, "cache_seqlens": g["cache_seqlens"] + 9}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(fa3, what):
    q, k, v, given = paged()
    tensors, given = REFUSED[what](q, k, v, given)
    with pytest.raises((Refused, Misuse)):
        fa3.flash_attn_with_kvcache(*tensors, **given)


def test_sinks_join_the_denominator(fa3):
    q, k, v, given = paged()
    plain, lse, *_ = fa3.flash_attn_with_kvcache(q, k, v, **given, return_softmax_lse=True)
    sinks = torch.full((4,), 1.0).bfloat16()
    out, with_sinks, *_ = fa3.flash_attn_with_kvcache(q, k, v, **given, return_softmax_lse=True, sinks=sinks)
    assert torch.allclose(with_sinks, torch.logaddexp(lse, torch.ones(())), atol=1e-5)
    weight = torch.exp(lse[0, 0] - with_sinks[0, 0])
    assert torch.allclose(out[0, 0].float(), plain[0, 0].float() * weight, atol=1e-2)
    assert math.isfinite(float(out.float().sum()))
