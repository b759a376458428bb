"""Layout ``VLLM_CPU``: an engine's own tensor without a copy, and what was written read back."""

from __future__ import annotations

import pytest
import torch
from vllm_cpu_cases import bind, device, spec, step

from attn_core import BadInputError, wrap_kv_cache
from attn_core.runtime import Batch, ContextChunk
from numerics.kernel_cases import slots

pytestmark = pytest.mark.usefixtures("vllm_cpu")


def chunk_of(batch: Batch, page_size: int) -> ContextChunk:
    """All keys of all sequences."""
    lens = batch.kv_lens
    whole = batch.ragged(lens, causal=False)
    return ContextChunk(
        starts=torch.zeros_like(lens), lens=lens, block_table=batch.block_table, page_size=page_size, batch=whole,
        plan=None,
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [32, 96])
@pytest.mark.parametrize("width", [48, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_written_is_read_back(dtype: str, width: int, page_size: int) -> None:
    group = bind(spec(dtype=dtype, head_dim=width), page_size=page_size)
    one = step(group)
    one.check()
    where = slots(one.batch.block_table, one.batch.kv_lens.tolist(), one.batch.kv_lens.tolist(), page_size)
    k, v = group.gather_kv(one.cache, one.plan, chunk_of(one.batch, page_size))
    for got, plain in zip((k, v), one.plain.data):
        assert torch.equal(got, plain.flatten(0, 1)[where])


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_are_read_back_with_their_scales(dtype: str, name: str) -> None:
    if "avx512" not in device().isa:
        pytest.skip("8-bit caches need AVX-512, which this build does without")
    group = bind(spec(dtype=dtype), kv_cache_dtype=name)
    one = step(group, scales=(0.5, 0.03))
    one.check()
    where = slots(one.batch.block_table, one.batch.kv_lens.tolist(), one.batch.kv_lens.tolist(), group.page_size)
    found = group.gather_kv(one.cache, one.plan, chunk_of(one.batch, group.page_size))
    for got, plain, scale in zip(found, one.plain.data, (0.5, 0.03)):
        want = (plain.view(torch.uint8).flatten(0, 1)[where].view(plain.dtype).float() * scale).to(got.dtype)
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_engines_tensor_is_used_in_place(dtype: torch.dtype) -> None:
    """vLLM keeps all layers in one buffer, so its blocks are further apart than they are long."""
    group = bind(spec(dtype=str(dtype).removeprefix("torch.")))
    one = step(group)
    pages = one.cache.num_pages
    buffer = torch.zeros(pages, 3, 2, 32, 128, dtype=dtype)  # a layer is one of three
    mine = buffer[:, 1]
    mine.copy_(one.cache.data[0])
    one.cache = wrap_kv_cache(mine, layout="VLLM_CPU", page_size=32)
    assert one.cache.data[0].data_ptr() == mine.data_ptr()
    one.check()
    assert int(buffer[:, [0, 2]].count_nonzero()) == 0
    assert int(mine.count_nonzero()) > 0


def test_new_caches_are_zeroed_and_of_that_shape() -> None:
    cache = bind(spec(), page_size=64).new_kv_cache(5)
    (data,) = cache.data
    assert tuple(data.shape) == (5, 2, 64, 128)
    assert not data.any()
    assert (cache.num_pages, cache.page_size, cache.layout) == (5, 64, "VLLM_CPU")


@pytest.mark.parametrize("make", [
    lambda t: (t[..., :64],),                                    # another width
    lambda t: (t.transpose(1, 2).contiguous().transpose(1, 2),),  # tokens before heads
    lambda t: (t.bfloat16(),),
    lambda t: (t[:, :1],),
    lambda t: (t, t),
], ids=["width", "order", "dtype", "heads", "two"])  # fmt: skip
def test_other_tensors_are_refused(make) -> None:
    group = bind(spec())
    one = step(group)
    one.cache = wrap_kv_cache(*make(one.cache.data[0]), layout="VLLM_CPU", page_size=32)
    with pytest.raises(BadInputError, match="VLLM_CPU is one"):
        one.run()
