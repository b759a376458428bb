"""The stand-ins of FlashMLA, vLLM's CUTLASS MLA and FlashAttention-4: one test per quirk."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from simulators import cuda_cutlass_mla, cuda_fa4, cuda_flash_mla
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.fixture
def mla():
    with installed(*cuda_flash_mla.stand_ins()):
        yield importlib.import_module("flash_mla")


@pytest.fixture
def fa4():
    with installed(cuda_fa4.stand_in()):
        yield importlib.import_module("flash_attn.cute")


def dense(mla, **more):
    return {
        "q": random(2, 1, 4, 576), "k_cache": random(3, 64, 1, 576), "block_table": ints(1, 2)[:, None],
        "cache_seqlens": ints(5, 9), "head_dim_v": 512, "tile_scheduler_metadata": mla.get_mla_metadata()[0],
        "use_legacy": True, **more,
    }  # fmt: skip


def sparse(mla, **more):
    cache = torch.zeros(3, 64, 1, 656, dtype=torch.uint8)
    rows = cache[1, :, 0]
    rows[:, :512] = random(64, 512).to(torch.float8_e4m3fn).view(torch.uint8)
    rows[:, 512:528] = torch.ones(64, 4).view(torch.uint8)
    rows[:, 528:] = random(64, 64).view(torch.uint8)
    indices = torch.full((1, 1, 128), -1, dtype=torch.int32)
    indices[..., :3] = ints(64, 70, 100)
    meta = mla.get_mla_metadata()[0]
    return {
        "q": random(1, 1, 64, 576), "k_cache": cache, "block_table": None, "cache_seqlens": None, "head_dim_v": 512,
        "tile_scheduler_metadata": meta, "indices": indices, "use_legacy": True, **more,
    }  # fmt: skip


def names(prefix):
    return {n[len(prefix) :] for n in globals() if n.startswith(prefix)}


def test_every_quirk_has_a_test():
    files = ("flash_mla", "flash_mla_planned", "vllm_flash_mla", "vllm_cutlass_mla", "flash_attn_4")
    quirks = [q for f in files for q in Contract.load(f).quirks]
    assert len(set(quirks)) == len(quirks)
    assert names("test_quirk_") == set(quirks)


def test_quirk_legacy_for_dense(mla):
    with pytest.raises(Refused, match="use_legacy"):
        mla.flash_mla_with_kvcache(**dense(mla, use_legacy=False))


def test_quirk_metadata_filled_by_the_first_call(mla):
    given = dense(mla)
    mla.flash_mla_with_kvcache(**given)
    mla.flash_mla_with_kvcache(**given)
    with pytest.raises(Misuse, match="another call"):
        mla.flash_mla_with_kvcache(**{**given, "cache_seqlens": ints(6, 9)})


def test_quirk_metadata_by_hand(mla):
    made = mla.get_mla_metadata()[0]
    made.tile_scheduler_metadata, made.num_splits = mla.get_mla_decoding_metadata(ints(5, 9), 4, 1, use_legacy=True)
    mla.flash_mla_with_kvcache(**dense(mla, tile_scheduler_metadata=made))
    made.tile_scheduler_metadata, made.num_splits = mla.get_mla_decoding_metadata(ints(5, 9), 4, 1)
    with pytest.raises(Misuse, match="another call"):
        mla.flash_mla_with_kvcache(**dense(mla, tile_scheduler_metadata=made))


def test_quirk_not_causal_by_default(mla):
    two = {"q": random(2, 2, 4, 576)}
    open_, _ = mla.flash_mla_with_kvcache(**dense(mla, **two))
    causal, _ = mla.flash_mla_with_kvcache(**dense(mla, **two), causal=True)
    assert torch.equal(open_[:, 1], causal[:, 1])
    assert not torch.equal(open_[:, 0], causal[:, 0])


def test_quirk_returns_a_pair(mla, fa4):
    out, lse = mla.flash_mla_with_kvcache(**dense(mla))
    assert (out.shape, lse.shape) == ((2, 1, 4, 512), (2, 4, 1))


def test_quirk_rows_without_keys_have_plus_inf(mla):
    given = dense(mla, cache_seqlens=ints(0, 9))
    out, lse = mla.flash_mla_with_kvcache(**given)
    assert not out[0].any()
    assert (lse[0] == math.inf).all()


def dense_fp8(mla, **more):
    """Beside :func:`dense`: an fp8 cache, with its metadata."""
    made = dense(mla)
    meta = made["tile_scheduler_metadata"]
    meta.tile_scheduler_metadata, meta.num_splits = mla.get_mla_decoding_metadata(
        made["cache_seqlens"], 4, 1, is_fp8_kvcache=True, use_legacy=True
    )
    q, cache = (made[n].to(torch.float8_e4m3fn) for n in ("q", "k_cache"))
    scales = {"descale_q": torch.ones(1), "descale_k": torch.full((1,), 0.5)}
    return {**made, "q": q, "k_cache": cache, "is_fp8_kvcache": True, **scales, **more}


def test_quirk_fp8_metadata_up_front(mla):
    mla.flash_mla_with_kvcache(**dense_fp8(mla))
    with pytest.raises(Refused, match="before the first call"):
        mla.flash_mla_with_kvcache(**dense_fp8(mla, tile_scheduler_metadata=mla.get_mla_metadata()[0]))
    meta = dense_fp8(mla)["tile_scheduler_metadata"]
    with pytest.raises(Misuse, match="another call"):  # that of 16 bits is another
        mla.flash_mla_with_kvcache(**dense(mla, tile_scheduler_metadata=meta))


def test_quirk_fp8_needs_both_descales(mla):
    for name in ("descale_q", "descale_k"):
        with pytest.raises(Refused, match="descale"):
            mla.flash_mla_with_kvcache(**dense_fp8(mla, **{name: None}))
        with pytest.raises(Refused, match="descale_shape"):
            mla.flash_mla_with_kvcache(**dense_fp8(mla, **{name: torch.ones(())}))
        with pytest.raises(Refused, match="descale"):
            mla.flash_mla_with_kvcache(**dense(mla), **{name: torch.ones(1)})


def test_quirk_dense_fp8_answers_in_bfloat16(mla):
    given = dense_fp8(mla)
    out, lse = mla.flash_mla_with_kvcache(**given)
    assert (out.dtype, out.shape, lse.shape) == (torch.bfloat16, (2, 1, 4, 512), (2, 4, 1))
    k = given["k_cache"][1, :5, 0].float() * 0.5
    want = torch.logsumexp(k @ given["q"][0, 0, 0].float() * 576**-0.5, 0)
    assert float(lse[0, 0, 0]) == pytest.approx(float(want), abs=1e-4)
    with pytest.raises(Refused, match="fp8_dtype"):
        mla.flash_mla_with_kvcache(**dense_fp8(mla, q=given["q"].bfloat16()))


@pytest.fixture
def vllm_mla():
    with installed(cuda_flash_mla.vllm()):
        yield importlib.import_module("vllm.v1.attention.ops.flashmla")


def vllm_fp8(vllm_mla, **more):
    lengths = ints(5, 9)
    tiles, splits = vllm_mla.get_mla_metadata_dense_fp8(lengths, 4, 1)
    return {
        "q": random(2, 1, 4, 576).to(torch.float8_e4m3fn), "k_cache": random(3, 64, 1, 576).to(torch.float8_e4m3fn),
        "block_table": ints(1, 2)[:, None], "cache_seqlens": lengths, "head_dim_v": 512,
        "tile_scheduler_metadata": tiles, "num_splits": splits, "descale_q": torch.ones(1),
        "descale_k": torch.full((1,), 0.5), **more,
    }  # fmt: skip


def test_quirk_vllm_fp8_needs_both_descales(vllm_mla):
    for name in ("descale_q", "descale_k"):
        with pytest.raises(Refused, match="required"):
            vllm_mla.flash_mla_with_kvcache_fp8(**vllm_fp8(vllm_mla, **{name: None}))
        with pytest.raises(Refused, match="descale_shape"):
            vllm_mla.flash_mla_with_kvcache_fp8(**vllm_fp8(vllm_mla, **{name: torch.ones(2)}))


def test_quirk_vllm_fp8_answers_in_bfloat16(vllm_mla):
    given = vllm_fp8(vllm_mla)
    assert vllm_mla.flash_mla_with_kvcache_fp8(**given)[0].dtype == torch.bfloat16
    with pytest.raises(Refused, match="dtype"):
        vllm_mla.flash_mla_with_kvcache_fp8(**{**given, "q": given["q"].bfloat16()})


def test_quirk_vllm_fp8_plain_metadata(vllm_mla):
    given = vllm_fp8(vllm_mla)
    vllm_mla.flash_mla_with_kvcache_fp8(**given)
    with pytest.raises(Misuse, match="another call"):
        vllm_mla.flash_mla_with_kvcache_fp8(**{**given, "cache_seqlens": ints(6, 9)})
    with pytest.raises(TypeError, match="num_splits"):
        vllm_mla.flash_mla_with_kvcache_fp8(**{n: x for n, x in given.items() if n != "num_splits"})


def test_quirk_sinks_leave_lse_alone(mla):
    out, lse = mla.flash_mla_with_kvcache(**sparse(mla))
    scaled, same = mla.flash_mla_with_kvcache(**sparse(mla), attn_sink=lse[0, :, 0])
    assert torch.equal(lse, same)
    assert torch.allclose(scaled.float(), out.float() / 2, atol=1e-2)


def test_quirk_sparse_indices_are_slots(mla):
    given = sparse(mla)
    out, _ = mla.flash_mla_with_kvcache(**given)
    rows = cuda_flash_mla.dequantised(given["k_cache"].flatten(0, 2)).bfloat16()[:, None]
    same, _, _ = mla.flash_mla_sparse_fwd(given["q"][0], rows, given["indices"], 576**-0.5, use_legacy=True)
    assert torch.allclose(out[0].float(), same.float(), atol=2e-2)
    with pytest.raises(Misuse, match="beyond"):
        mla.flash_mla_with_kvcache(**{**given, "indices": given["indices"] + 1000})


def test_quirk_sparse_returns_three(mla):
    given = sparse(mla)
    rows = random(70, 1, 576)
    out, top, lse = mla.flash_mla_sparse_fwd(given["q"][0], rows, given["indices"].clamp(max=69), 0.1, use_legacy=True)
    assert (out.shape, top.shape, lse.shape) == ((1, 64, 512), (1, 64), (1, 64))


def test_quirk_sparse_is_not_causal(mla):
    with pytest.raises(Refused, match="causal"):
        mla.flash_mla_with_kvcache(**sparse(mla), causal=True)


def cutlass(dtype=torch.bfloat16, out=torch.bfloat16):
    q = random(2, 128, 512).to(dtype), random(2, 128, 64).to(dtype)
    space = torch.zeros(64 << 20, dtype=torch.uint8)
    return [
        torch.zeros(2, 128, 512, dtype=out), torch.zeros(2, 128), *q, random(3, 128, 576).to(dtype), ints(5, 9),
        ints(1, 2)[:, None], space, 0.1, -1,
    ]  # fmt: skip


def test_quirk_fills_what_it_is_given():
    with installed(cuda_cutlass_mla.stand_in()):
        given = cutlass()
        assert torch.ops._C.sm100_cutlass_mla_decode(*given) is None
        assert given[0].any()
        given[1] = torch.empty(0)
        torch.ops._C.sm100_cutlass_mla_decode(*given)
    assert not hasattr(torch.ops._C, "sm100_cutlass_mla_decode")


def test_quirk_lse_is_natural():
    with installed(cuda_cutlass_mla.stand_in()):
        given = cutlass()
        torch.ops._C.sm100_cutlass_mla_decode(*given)
    k = given[4][1, :5].float()
    want = torch.logsumexp(torch.cat([given[2][0, 0], given[3][0, 0]]).float() @ k.T * 0.1, 0)
    assert float(given[1][0, 0]) == pytest.approx(float(want), abs=1e-3)


def test_quirk_one_query_a_row():
    with installed(cuda_cutlass_mla.stand_in()):
        given = cutlass()
        given[5] = ints(5)
        with pytest.raises(Refused, match="seq_lens"):
            torch.ops._C.sm100_cutlass_mla_decode(*given)


def test_quirk_fp8_answers_in_bfloat16():
    with installed(cuda_cutlass_mla.stand_in()):
        torch.ops._C.sm100_cutlass_mla_decode(*cutlass(torch.float8_e4m3fn))
        with pytest.raises(Refused, match="out is"):
            torch.ops._C.sm100_cutlass_mla_decode(*cutlass(torch.float8_e4m3fn, torch.float16))


def packed():
    return {
        "q": random(3, 4, 64), "k": random(4, 128, 2, 64), "v": random(4, 128, 2, 64), "cu_seqlens_q": ints(0, 1, 3),
        "max_seqlen_q": 2, "max_seqlen_k": 9, "seqused_k": ints(5, 9), "page_table": ints(1, 2)[:, None],
        "causal": True,
    }  # fmt: skip


def test_quirk_window_off_is_none(fa4):
    plain, _ = fa4.flash_attn_varlen_func(**packed())
    assert torch.equal(plain, fa4.flash_attn_varlen_func(**packed(), window_size=(-1, -1))[0])
    with pytest.raises(Misuse, match="one side"):
        fa4.flash_attn_varlen_func(**packed(), window_size=(3, -1))


def test_quirk_pages_without_offsets(fa4):
    with pytest.raises(Refused, match="seqused_k"):
        fa4.flash_attn_varlen_func(**packed(), cu_seqlens_k=ints(0, 5, 14))


def test_quirk_always_a_pair(fa4):
    out, lse = fa4.flash_attn_varlen_func(**packed())
    assert lse is None
    assert fa4.flash_attn_varlen_func(**packed(), return_lse=True)[1].shape == (4, 3)
    assert out.shape == (3, 4, 64)


def test_quirk_no_kvcache_function(fa4):
    assert not hasattr(fa4, "flash_attn_with_kvcache")


def test_quirk_no_descales(fa4):
    with pytest.raises(TypeError, match="k_descale"):
        fa4.flash_attn_varlen_func(**packed(), k_descale=torch.ones(2, 2))


def test_quirk_no_out(fa4):
    with pytest.raises(TypeError, match="out"):
        fa4.flash_attn_varlen_func(**packed(), out=torch.empty(3, 4, 64))
