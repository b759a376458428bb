"""Caches: layouts as names, views without copies, both forms of the scales, a zeroed null page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simple_kernels import CPU, Pick, group, install, spec

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime import KV_DTYPES, wrap_kv_cache
from attn_core.runtime.cache import kv_dtype
from attn_core.spec import Device
from attn_core.spec.check import KV_CACHE_DTYPES


def test_nhd_wraps_without_a_copy() -> None:
    k, v = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 6)
    cache = wrap_kv_cache(k, v, layout="NHD")
    assert cache.k is k
    assert cache.v is v
    assert (cache.page_size, cache.num_pages) == (4, 3)


def test_hnd_views_are_strided_and_live() -> None:
    k, v = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 6)
    cache = wrap_kv_cache(k, v, layout="HND")
    assert cache.page_size == 4
    assert (cache.k.shape, cache.v.shape) == ((3, 4, 2, 8), (3, 4, 2, 6))
    cache.k[2, 3, 1] = 5.0
    assert k[2, 1, 3].eq(5.0).all()
    assert cache.k.data_ptr() == k.data_ptr()


def test_an_engines_interleaved_tensor_wraps_as_strided_views() -> None:
    both = torch.zeros(3, 2, 4, 2, 8)  # FlashInfer's (pages, 2, page, heads, width)
    cache = wrap_kv_cache(both[:, 0], both[:, 1], layout="NHD")
    cache.v[1, 0] = 1.0
    assert both[1, 1, 0].eq(1.0).all()
    assert both[1, 0].eq(0.0).all()


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [([torch.zeros(3, 4, 24)], "MLA"), ([torch.zeros(3, 4, 16), torch.zeros(3, 4, 8)], "MLA_SPLIT")],
)
def test_latent_layouts_have_no_k_and_v(tensors: list[torch.Tensor], layout: str) -> None:
    cache = wrap_kv_cache(*tensors, layout=layout)
    assert cache.page_size == 4
    assert all(a is b for a, b in zip(cache.data, tensors))
    for name in "kv":
        with pytest.raises(AttnCoreError, match=rf"KVCache\.{name}: layout '{layout}' has no such view"):
            getattr(cache, name)


def test_private_layouts_are_opaque() -> None:
    raw = torch.zeros(5, 656 * 64, dtype=torch.uint8)
    cache = wrap_kv_cache(raw, layout="DSA_FP8", page_size=64)
    assert cache.num_pages == 5
    assert cache.data[0] is raw
    with pytest.raises(AttnCoreError, match="only NHD and HND"):
        _ = cache.k
    with pytest.raises(BadInputError, match="give page_size"):
        wrap_kv_cache(raw, layout="DSA_FP8")


K, V = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 6)
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((), {"layout": "NHD"}, "give the cache tensors"),
    ((K,), {"layout": "NHD"}, r"has 2 tensor\(s\), got 1"),
    ((K, V, V), {"layout": "HND"}, r"has 2 tensor\(s\), got 3"),
    ((K, V[:2]), {"layout": "NHD"}, "the others equal"),
    ((K[0], V[0]), {"layout": "NHD"}, "pages, page, heads, width"),
    ((K.transpose(2, 3), V), {"layout": "NHD"}, "last axis contiguous"),
    ((K, V.half()), {"layout": "NHD"}, "differ in device or dtype"),
    ((K, V), {"layout": "NHD", "page_size": 8}, "pages of 4"),
    ((K, V), {"layout": "NHD", "k_scale": 0.0}, "k_scale=0.0 must be a positive number"),
    ((K, V), {"layout": "NHD", "v_scale": torch.ones(2, 2)}, "v_scale"),
]


@pytest.mark.parametrize(("tensors", "arguments", "says"), WRONG, ids=[w[2] for w in WRONG])
def test_wrong_caches_are_refused(tensors: tuple[Any, ...], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        wrap_kv_cache(*tensors, **arguments)


def test_scales_have_both_forms_made_once() -> None:
    cache = wrap_kv_cache(K, V, layout="NHD", k_scale=0.5, v_scale=torch.tensor(2.0))
    assert (cache.k_scale, cache.v_scale) == (0.5, 2.0)
    assert isinstance(cache.v_scale, float)
    assert cache.k_scale_t is cache.k_scale_t
    assert cache.k_scale_t.shape == ()
    assert cache.k_scale_t.dtype == torch.float32
    assert wrap_kv_cache(K, V, layout="NHD").v_scale == 1.0


def test_scales_per_head_have_no_single_value() -> None:
    cache = wrap_kv_cache(K, V, layout="NHD", k_scale=torch.tensor([0.5, 0.25]))
    assert cache.k_scale_t.tolist() == [0.5, 0.25]
    assert cache.v_scale == 1.0
    with pytest.raises(AttnCoreError, match="read k_scale_t"):
        _ = cache.k_scale


def test_every_cache_dtype_of_the_vocabulary_has_a_storage_dtype() -> None:
    assert {*KV_DTYPES, "auto"} == set(KV_CACHE_DTYPES)
    fnuz = Device(platform="rocm", arch="gfx942", isa=frozenset({"fp8_fnuz"}))
    assert kv_dtype("fp8_e4m3", CPU) == torch.float8_e4m3fn
    assert kv_dtype("fp8_e4m3", fnuz) == torch.float8_e4m3fnuz
    assert kv_dtype("int8", fnuz) == torch.int8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_new_caches_are_zeroed_whole(layout: str, dtype: str) -> None:
    g = group(spec(v_head_dim=6), values={"kv_layout": layout, "kv_cache_dtype": dtype})
    cache = g.new_kv_cache(7, k_scale=0.5)
    assert cache.data[0].dtype == kv_dtype(dtype, CPU)
    assert (cache.k.shape, cache.v.shape) == ((7, 4, 2, 8), (7, 4, 2, 6))
    assert cache.layout == layout
    assert cache.k_scale == 0.5
    assert all(t.float().eq(0).all() for t in cache.data)


def test_mla_caches() -> None:
    mla = spec(kind="mla", num_kv_heads=6, head_dim=12, v_head_dim=8, latent_dim=16, rope_dim=4, nope_dim=8)
    picks = {r: Pick(form="absorbed") for r in ("prefill", "decode")}
    assert [t.shape for t in group(mla, **picks).new_kv_cache(3).data] == [(3, 4, 20)]
    split = group(mla, values={"kv_layout": "MLA_SPLIT"}, **picks).new_kv_cache(3)
    assert [t.shape for t in split.data] == [(3, 4, 16), (3, 4, 4)]


def test_a_private_layout_is_allocated_by_its_writer_and_zeroed() -> None:
    from attn_core.runtime import Kernels

    def bind(b: Any) -> Kernels:
        nothing = lambda *a, **k: None  # noqa: E731
        allocate = (lambda n: (torch.ones(n, 16),)) if b.role == "kv_write" else None
        return Kernels(nothing, nothing, allocate=allocate)

    values = {"kv_layout": "NZ"}
    g = group(spec(), values=values, kv_write=Pick(bind=install(bind)))
    cache = g.new_kv_cache(5)
    assert cache.data[0].shape == (5, 16)
    assert cache.data[0].eq(0).all()
    assert cache.page_size == 4
    with pytest.raises(AttnCoreError, match="nobody allocates layout 'NZ'"):
        group(spec(), values=values).new_kv_cache(5)


def test_who_has_no_cache_says_so() -> None:
    with pytest.raises(AttnCoreError, match="keeps no KV cache; pass kv_cache=None"):
        group(spec(attn_type="encoder_only")).new_kv_cache(4)
    with pytest.raises(AttnCoreError, match="reads the cache of group 'full'"):
        group(spec(kv_from="full")).new_kv_cache(4)
    with pytest.raises(BadInputError, match="num_pages=0"):
        group(spec()).new_kv_cache(0)
