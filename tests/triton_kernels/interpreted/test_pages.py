"""The kernels that write pages and read them back, for every public layout and cache dtype."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Lengths, mla_spec, slots, spec, step
from test_kv_write import rows_of
from triton_cases import bind

from attn_core.backends.torch_native import kv_write as plain
from attn_core.runtime import wrap_kv_cache
from attn_core.runtime.plan import ContextChunk

LAYOUTS = ["NHD", "HND", "MLA", "MLA_SPLIT"]
LENGTHS = Lengths((1, 3, 2), (9, 3, 30))


def group_for(layout, kv_dtype=None, dtype="float32", page_size=4):
    mla = layout.startswith("MLA")
    made = mla_spec(dtype=dtype) if mla else spec(dtype=dtype, v_head_dim=24)
    form = "absorbed" if mla else None
    return bind(made, form=form, page_size=page_size, kv_layout=layout, kv_cache_dtype=kv_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_keys_land_in_their_slots_and_nowhere_else(layout, dtype):
    s = step(group_for(layout, dtype=dtype), LENGTHS)
    before = [t.clone() for t in rows_of(s.cache)]
    where = slots(s.batch.block_table, LENGTHS.query, LENGTHS.kv, 4)
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    for was, now, new in zip(before, rows_of(s.cache), (s.k, s.v)):
        was[where] = new.view(len(where), *was.shape[1:])
        assert torch.equal(now, was)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slot_minus_one_and_the_null_page_are_not_written(layout):
    s = step(group_for(layout), LENGTHS)
    where = s.batch.slot_mapping.clone()
    where[0], where[2] = -1, 3
    before = [t.clone() for t in rows_of(s.cache)]
    s.k[0] = float("nan")  # padding may hold anything
    plan = s.group.plan(s.batch.with_pages(s.batch.block_table, where))
    s.group.write_kv(s.k, s.v, s.cache, plan)
    real = where >= 4
    for was, now, new in zip(before, rows_of(s.cache), (s.k, s.v)):
        was[where[real]] = new[real].view(-1, *was.shape[1:])
        assert torch.equal(now, was)
    assert all(bool((t[0] == 0).all()) for t in s.cache.data)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("per_head", [False, True])
def test_narrow_caches_hold_what_the_plain_writer_stores(layout, kv_dtype, per_head):
    """Bit by bit: scaled, clamped, rounded to the nearest, ties to even."""
    if per_head and layout.startswith("MLA"):
        pytest.skip("one head")
    scales = (torch.tensor([0.03, 0.05, 0.01]), torch.tensor([0.02, 0.04, 0.5])) if per_head else (0.03, 0.05)
    s = step(group_for(layout, kv_dtype), LENGTHS, scales=scales)
    s.k[1, ..., :4] = torch.tensor([1e5, -1e5, 0.0, 0.045])
    s.v[1, ..., :4] = torch.tensor([1e5, -1e5, 0.075, -0.025])
    before = [t.clone() for t in s.cache.data]
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    got = [t.clone() for t in s.cache.data]
    for t, was in zip(s.cache.data, before):
        t[:] = was
    other = plain.bind(s.group.bindings["kv_write"])
    s.plan.write = other.plan(s.batch)
    other.call(s.k, s.v, s.cache, s.plan)
    for mine, theirs in zip(got, s.cache.data):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [None, "fp8_e4m3", "int8"])
def test_written_keys_can_be_read_back(layout, kv_dtype):
    s = step(group_for(layout, kv_dtype), LENGTHS, scales=(0.03, 0.03) if kv_dtype == "int8" else (1.0, 1.0))
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    lens, starts = torch.tensor(LENGTHS.query, dtype=torch.int32), torch.tensor([8, 0, 28], dtype=torch.int32)
    chunk = ContextChunk(
        starts=starts, lens=lens, block_table=s.batch.block_table, page_size=4, plan=s.plan,
        batch=s.batch.ragged(lens, causal=False),
    )  # fmt: skip
    error = {None: 0.0, "fp8_e4m3": 2.0**-4, "int8": 0.0}[kv_dtype]
    for got, new in zip(s.group.gather_kv(s.cache, s.plan, chunk), (s.k, s.v)):
        assert (got.dtype, got.shape) == (new.dtype, new.shape)
        allowed = error * new.abs() + {"int8": 0.015001, "fp8_e4m3": 2.0**-9}.get(kv_dtype, 0.0)
        assert bool(((got - new).abs() <= allowed).all())


def test_an_engines_own_strided_cache():
    """k and v interleaved page by page in one tensor; the engine's q, k and v slices of one."""
    for layout in ("NHD", "HND"):
        s = step(bind(spec(), lse=True, page_size=4, kv_layout=layout), LENGTHS)
        both = torch.stack(s.cache.data, 1)
        s.cache = wrap_kv_cache(both[:, 0], both[:, 1], layout=layout)
        s.q, s.k, s.v = torch.cat([s.q, s.k, s.v], 1).split([6, 3, 3], 1)
        s.check()


def test_offsets_beyond_32_bits():
    """Pages three billion elements away. The memory is reserved, not written, so only the pages touched are real."""
    group = bind(spec(num_heads=2, num_kv_heads=1), lse=True, page_size=16)
    s = step(group, Lengths((1,), (20,)))
    far = 1 << 31
    room = torch.empty(3 * far // 2 + 4096, dtype=torch.float32)
    k = torch.as_strided(room, (4, 16, 1, 16), (far // 2, 16, 16, 1))
    assert k.stride(0) * 3 > 2**31
    for page in (1, 2, 3):
        k[page] = s.cache.k[1 + page % 2]
    v = torch.as_strided(room, (4, 16, 1, 16), (far // 2, 16, 16, 1), 256 * 4)
    for page in (1, 2, 3):
        v[page] = s.cache.v[1 + page % 2]
    s.cache = wrap_kv_cache(k, v, layout="NHD")
    table = torch.tensor([[3, 2, 0]], dtype=torch.int32)
    from attn_core.runtime import Batch

    where = torch.tensor([2 * 16 + 3])
    s.batch = Batch([1], [20], block_table=table, slot_mapping=where)
    s.plan = group.plan(s.batch)
    got, lse = s.run(return_lse=True)
    keys = torch.cat([k[3], k[2]])[:20].double(), torch.cat([v[3], v[2]])[:20].double()
    x = torch.einsum("hd,jd->hj", s.q[0].double(), keys[0][:, 0]) * group.scale
    assert torch.allclose(lse[0].double(), x.logsumexp(-1), atol=1e-5)
    assert torch.allclose(got[0].double(), x.softmax(-1) @ keys[1][:, 0], atol=1e-5)
