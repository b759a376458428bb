"""The stand-ins of FlashAttention-3 from its own repository and of vLLM's FlashAttention: one test per quirk."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from simulators import cuda_fa3, cuda_vllm_flash
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed

FP8 = torch.float8_e4m3fn


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


@pytest.fixture
def upstream():
    with installed(cuda_fa3.upstream()):
        yield importlib.import_module("flash_attn_interface")


@pytest.fixture
def vllm():
    with installed(cuda_vllm_flash.stand_in()):
        yield importlib.import_module("vllm.vllm_flash_attn")


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def pages(page_size=16, d=64, dv=64, heads=4, dtype=torch.bfloat16):
    """q of two rows and of one with three queries; their keys; as vLLM takes them."""
    tensors = [random(5, heads, d), random(5, page_size, 2, d), random(5, page_size, 2, dv)]
    given = {
        "max_seqlen_q": 3, "cu_seqlens_q": ints(0, 1, 2, 5), "max_seqlen_k": 30, "seqused_k": ints(5, 30, 7),
        "block_table": ints(1, 0, 2, 3, 4, 0).view(3, 2), "causal": True,
    }  # fmt: skip
    return [t.to(dtype) for t in tensors], given


def upstream_pages(**more):
    tensors, given = pages(**more)
    renamed = {
        "cache_seqlens": given["seqused_k"], "page_table": given["block_table"], "causal": True,
        "cu_seqlens_q": given["cu_seqlens_q"], "max_seqlen_q": 3,
    }  # fmt: skip
    return tensors, renamed


def rows(keys=(2, 0, 3)):
    """Packed q, k, v of three sequences, one of them without keys."""
    return random(4, 4, 64), random(sum(keys), 2, 64), random(sum(keys), 2, 64)


def test_every_quirk_has_a_test():
    quirks = [q for f in ("flash_attn_3", "vllm_flash_attn") for q in Contract.load(f).quirks]
    assert len(set(quirks)) == len(quirks)
    assert {n[11:] for n in globals() if n.startswith("test_quirk_")} == set(quirks)


# flash_attn_interface -------------------------------------------------------------------------------------------------


def test_quirk_kvcache_returns_rest(upstream):
    (q, k, v), given = upstream_pages()
    assert len(upstream.flash_attn_with_kvcache(q, k, v, **given, return_softmax_lse=True)) == 4
    assert isinstance(upstream.flash_attn_with_kvcache(q, k, v, **given), torch.Tensor)


def test_quirk_ragged_lse_by_another_name(upstream):
    given = (*rows(), ints(0, 2, 3, 4), ints(0, 2, 2, 5), 2, 3)
    out, lse = upstream.flash_attn_varlen_func(*given, return_attn_probs=True)
    assert (out.shape, lse.shape) == ((4, 4, 64), (4, 4))
    assert (lse[:, 2] == -math.inf).all()
    with pytest.raises(TypeError, match="return_softmax_lse"):
        upstream.flash_attn_varlen_func(*given, return_softmax_lse=True)


def test_quirk_no_sinks(upstream):
    (q, k, v), given = upstream_pages()
    for name in ("sinks", "s_aux"):
        with pytest.raises(TypeError, match=name):
            upstream.flash_attn_with_kvcache(q, k, v, **given, **{name: None})


def test_quirk_no_out(upstream):
    (q, k, v), given = upstream_pages()
    with pytest.raises(TypeError, match="out"):
        upstream.flash_attn_with_kvcache(q, k, v, **given, out=torch.empty_like(q))


def test_quirk_scale_counts_qv(upstream):
    (q, k, v), given = upstream_pages(dv=512)
    qv = random(5, 4, 512)
    default = upstream.flash_attn_with_kvcache(q, k, v, qv=qv, **given)
    assert torch.equal(default, upstream.flash_attn_with_kvcache(q, k, v, qv=qv, **given, softmax_scale=576**-0.5))


def scheduled(package, given, max_seqlen_k, page_size=16, **more):
    return package.get_scheduler_metadata(
        3, 3, max_seqlen_k, 4, 2, 64, given.get("cache_seqlens", given.get("seqused_k")), page_size=page_size,
        **{"causal": True, **more},
    )  # fmt: skip


def test_quirk_table_is_the_longest(upstream):
    (q, k, v), given = upstream_pages()
    upstream.flash_attn_with_kvcache(q, k, v, **given, scheduler_metadata=scheduled(upstream, given, 32))
    with pytest.raises(Misuse, match="another call"):
        upstream.flash_attn_with_kvcache(q, k, v, **given, scheduler_metadata=scheduled(upstream, given, 30))


def test_quirk_metadata_of_one_call(upstream):
    (q, k, v), given = upstream_pages()
    for other in ({"window_size": (3, 0)}, {"num_splits": 1}, {"attention_chunk": 8}):
        with pytest.raises(Misuse, match="another call"):
            upstream.flash_attn_with_kvcache(
                q, k, v, **given, scheduler_metadata=scheduled(upstream, given, 32, **other)
            )


# vllm.vllm_flash_attn -------------------------------------------------------------------------------------------------


def test_quirk_longest_before_offsets(vllm):
    (q, k, v), given = pages()
    by_name = vllm.flash_attn_varlen_func(q, k, v, **given)
    offsets, table = given["cu_seqlens_q"], given["block_table"]
    more = {"seqused_k": given["seqused_k"], "block_table": table, "causal": True}
    assert torch.equal(by_name, vllm.flash_attn_varlen_func(q, k, v, 3, offsets, 30, **more))
    with pytest.raises((Refused, AttributeError)):
        vllm.flash_attn_varlen_func(q, k, v, offsets, 3, 30, **more)


def test_quirk_version_2_by_default(vllm):
    (q, k, v), given = pages()
    vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=3, s_aux=torch.zeros(4).bfloat16())
    with pytest.raises(Refused, match="fa_version=2"):
        vllm.flash_attn_varlen_func(q, k, v, **given, s_aux=torch.zeros(4).bfloat16())


def test_quirk_one_kind_of_key_lengths(vllm):
    (q, k, v), given = pages()
    lengths = given.pop("seqused_k")
    offsets = ints(0, 5, 35, 42)
    for wrong in ({}, {"cu_seqlens_k": offsets}, {"cu_seqlens_k": offsets, "seqused_k": lengths}):
        with pytest.raises(Refused, match="seqused_k"):
            vllm.flash_attn_varlen_func(q, k, v, **given, **wrong)


def test_quirk_scale_counts_q_alone(vllm):
    (q, k, v), given = pages(dv=512)
    more = {**given, "q_v": random(5, 4, 512), "fa_version": 3}
    default = vllm.flash_attn_varlen_func(q, k, v, **more)
    assert torch.equal(default, vllm.flash_attn_varlen_func(q, k, v, **more, softmax_scale=64**-0.5))
    assert not torch.equal(default, vllm.flash_attn_varlen_func(q, k, v, **more, softmax_scale=576**-0.5))


def test_quirk_fa2_has_no_sinks(vllm):
    (q, k, v), given = pages()
    with pytest.raises(Refused, match="s_aux"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=2, s_aux=torch.zeros(4))


def test_quirk_fa2_drops_descales(vllm):
    (q, k, v), given = pages()
    with pytest.raises(Misuse, match="dropped"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=2, k_descale=torch.ones(3, 2))


def test_quirk_fa2_one_query_reads_no_offsets(vllm):
    (q, k, v), given = pages()
    given["max_seqlen_q"], given["cu_seqlens_q"] = 1, ints(0, 1, 2, 2)
    with pytest.raises(Misuse, match="row i"):
        vllm.flash_attn_varlen_func(q[:2], k, v, **given, fa_version=2)
    vllm.flash_attn_varlen_func(q[:2], k, v, **given, fa_version=2, window_size=[3, 0])
    vllm.flash_attn_varlen_func(q[:2], k, v, **given, fa_version=3)


def test_quirk_fa2_rows_without_keys_have_plus_inf(vllm):
    given = (*rows(), 2, ints(0, 2, 3, 4), 3, ints(0, 2, 2, 5))
    for version, sign in ((2, math.inf), (3, -math.inf), (4, -math.inf)):
        out, lse = vllm.flash_attn_varlen_func(*given, fa_version=version, return_softmax_lse=True)
        assert not out[2].any()
        assert (lse[:, 2] == sign).all()


def test_quirk_fa3_sinks_are_narrow(vllm):
    (q, k, v), given = pages(heads=66)
    sinks = torch.zeros(66).bfloat16()
    with pytest.raises(Refused, match="sinks_heads"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=3, s_aux=sinks)
    (q, k, v), given = pages(d=192, dv=128)
    with pytest.raises(Refused, match="hdim_v"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=3, s_aux=sinks[:4])
    (q, k, v), given = pages()
    with pytest.raises(Refused, match="sinks_dtype"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=3, s_aux=torch.zeros(4))


def test_quirk_fa3_metadata_of_one_call(vllm):
    (q, k, v), given = pages()
    right = {"scheduler_metadata": scheduled(vllm, given, 30)}
    vllm.flash_attn_varlen_func(q, k, v, **given, **right, fa_version=3)
    for other in ({"max_seqlen_k": 32}, {"num_splits": 1}, {"window_size": (3, 0)}):
        with pytest.raises(Misuse, match="another call"):
            vllm.flash_attn_varlen_func(q, k, v, **{**given, **other}, **right, fa_version=3)


def test_quirk_always_a_pair_at_most(vllm):
    (q, k, v), given = pages(128)
    for version in (2, 3, 4):
        out, lse = vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=version, return_softmax_lse=True)
        assert lse.shape == (4, 5)
        filled = torch.empty_like(out)
        assert vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=version, out=filled) is filled
        assert torch.equal(out, filled)


def test_quirk_fa4_forgets_descales_of_16_bits(vllm):
    (q, k, v), given = pages(128)
    with pytest.raises(Misuse, match="dropped"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=4, k_descale=torch.full((3, 2), 2.0))


def test_quirk_fa4_fp8_in_one_dtype(vllm):
    (q, k, v), given = pages(128)
    q8, k8, v8 = (t.to(FP8) for t in (q, k, v))
    with pytest.raises(Refused, match="same dtype"):
        vllm.flash_attn_varlen_func(q, k8, v8, **given, fa_version=4)
    plain = vllm.flash_attn_varlen_func(q8, k8, v8, **given, fa_version=4)
    assert plain.dtype == torch.bfloat16
    twice = vllm.flash_attn_varlen_func(q8, k8, v8, **given, fa_version=4, v_descale=torch.full((3, 2), 2.0))
    assert torch.equal(twice, plain * 2)
    with pytest.raises(Refused, match="descales"):
        vllm.flash_attn_varlen_func(q8, k8, v8, **given, fa_version=4, v_descale=torch.ones(1))


def test_quirk_no_chunks(vllm):
    (q, k, v), given = pages()
    with pytest.raises(TypeError, match="attention_chunk"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=3, attention_chunk=0)
    with pytest.raises(TypeError, match="attention_chunk"):
        scheduled(vllm, given, 30, attention_chunk=0)


@pytest.mark.parametrize(
    ("version", "page_size"), [(2, 8), (3, 24), (4, 64)], ids=["fa2 of 8", "fa3 of 24", "fa4 of 64"]
)
def test_pages_that_no_engine_gives_are_refused(vllm, version, page_size):
    (q, k, v), given = pages(page_size)
    given["seqused_k"], given["max_seqlen_k"] = ints(5, 9, 7), 9
    with pytest.raises(Refused, match="page_size"):
        vllm.flash_attn_varlen_func(q, k, v, **given, fa_version=version)
