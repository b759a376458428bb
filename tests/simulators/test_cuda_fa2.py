"""The stand-in of FlashAttention-2: its quirks."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from simulators import cuda_fa2
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed


@pytest.fixture
def fa2():
    with installed(cuda_fa2.stand_in()):
        yield importlib.import_module("flash_attn")


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def rows(keys=(2, 0, 3)):
    """Packed q, k, v of three sequences and their offsets, one of them without keys."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 64, generator=g).half() for n, h in ((4, 4), (sum(keys), 2), (sum(keys), 2)))
    return q, k, v, ints(0, 2, 3, 4), torch.cat((ints(0), torch.tensor(keys).cumsum(0).int())), 2, max(keys)


def pages(page_size=256):
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, page_size, 2, 64, generator=g).half() for _ in range(2))
    given = {"cache_seqlens": ints(5, 9), "block_table": ints(1, 2)[:, None], "causal": True}
    return torch.randn(2, 1, 4, 64, generator=g).half(), k, v, given


def test_every_quirk_has_a_test():
    assert {n[11:] for n in globals() if n.startswith("test_quirk_")} == set(Contract.load("flash_attn_2").quirks)


def test_quirk_probs_returns_three(fa2):
    out, lse, probabilities = fa2.flash_attn_varlen_func(*rows(), return_attn_probs=True)
    assert (out.shape, lse.shape, probabilities) == ((4, 4, 64), (4, 4), None)
    with pytest.raises(TypeError):
        fa2.flash_attn_varlen_func(*rows(), return_softmax_lse=True)


def test_quirk_kvcache_is_batched(fa2):
    q, k, v, given = pages()
    out, lse = fa2.flash_attn_with_kvcache(q, k, v, **given, return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((2, 1, 4, 64), (2, 4, 1))
    with pytest.raises(Refused, match="batch, queries"):
        fa2.flash_attn_with_kvcache(q[:, 0], k, v, **given)


def test_quirk_cumulative_keys_with_pages(fa2):
    q, k, v, given = pages()
    batched = fa2.flash_attn_with_kvcache(q, k, v, **given)
    table = given["block_table"]
    packed = fa2.flash_attn_varlen_func(q[:, 0], k, v, ints(0, 1, 2), ints(0, 5, 14), 1, 9, block_table=table)
    assert torch.equal(batched[:, 0], packed)
    with pytest.raises(Refused):
        fa2.flash_attn_with_kvcache(*pages(16)[:3], **given)


def test_quirk_short_max_seqlen_k_drops_the_window(fa2):
    q, k, v, cu_q, cu_k, max_q, max_k = rows()
    with pytest.raises(Misuse, match="max_seqlen_k"):
        fa2.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k - 1)


def test_quirk_rows_without_keys_have_plus_inf(fa2):
    out, lse, _ = fa2.flash_attn_varlen_func(*rows(), return_attn_probs=True)
    assert not out[2].any()
    assert (lse[:, 2] == math.inf).all()


def test_quirk_no_out(fa2):
    q, k, v, given = pages()
    with pytest.raises(TypeError, match="out"):
        fa2.flash_attn_with_kvcache(q, k, v, **given, out=torch.empty_like(q))


def test_alibi_is_minus_slope_times_distance(fa2):
    q, k, v, given = pages()
    steep = fa2.flash_attn_with_kvcache(q, k, v, **given, alibi_slopes=torch.full((4,), 1e4))
    assert torch.equal(steep[0, 0, 0], v[1, 4, 0])  # only the last key is left
    with pytest.raises(Refused, match="alibi"):
        fa2.flash_attn_with_kvcache(q, k, v, **given, alibi_slopes=torch.zeros(4).half())
