"""Writing pages and reading them back, for every public layout and cache dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Lengths, bind, mla_spec, slots, spec, step, table

from attn_core.backends.torch_native import kv_write
from attn_core.runtime import Batch, wrap_kv_cache
from attn_core.runtime.cache import KV_DTYPES
from attn_core.runtime.plan import ContextChunk

LAYOUTS = ["NHD", "HND", "MLA", "MLA_SPLIT"]
LENGTHS = Lengths((1, 3, 2), (9, 3, 30))


def group_for(layout, kv_dtype=None, dtype="float32", page_size=4):
    made = mla_spec(dtype=dtype) if layout.startswith("MLA") else spec(dtype=dtype, v_head_dim=24)
    form = "absorbed" if layout.startswith("MLA") else None
    return bind(made, form=form, page_size=page_size, kv_layout=layout, kv_cache_dtype=kv_dtype)


def rows_of(cache):
    """k and v of every slot, ``(slots, heads, width)`` (MLA: one head), as stored."""
    if cache.layout == "MLA":
        return cache.data[0].flatten(0, 1).unsqueeze(1).split([32, 8], -1)
    if cache.layout == "MLA_SPLIT":
        return [t.flatten(0, 1).unsqueeze(1) for t in cache.data]
    return [t.reshape(-1, *t.shape[2:]) for t in (cache.k, cache.v)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_new_keys_land_in_their_slots_and_nowhere_else(layout, page_size):
    s = step(group_for(layout, page_size=page_size), LENGTHS)
    before = [t.clone() for t in rows_of(s.cache)]
    where = slots(s.batch.block_table, LENGTHS.query, LENGTHS.kv, page_size)
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    for was, now, new in zip(before, rows_of(s.cache), (s.k, s.v)):
        was[where] = new.view(len(where), *was.shape[1:])
        assert torch.equal(now, was)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slot_of_minus_one_is_not_written_and_the_null_page_stays_zero(layout):
    s = step(group_for(layout), LENGTHS)
    where = s.batch.slot_mapping.clone()
    where[[0, 2]] = -1
    before = [t.clone() for t in rows_of(s.cache)]
    s.k[0] = float("nan")  # padding may hold anything
    plan = s.group.plan(s.batch.with_pages(s.batch.block_table, where))
    s.group.write_kv(s.k, s.v, s.cache, plan)
    keep = where >= 0
    for was, now, new in zip(before, rows_of(s.cache), (s.k, s.v)):
        was[where[keep]] = new[keep].view(-1, *was.shape[1:])
        assert torch.equal(now, was)
    assert all(bool((t[0] == 0).all()) for t in s.cache.data)


FLOATS = ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [*FLOATS, "int8"])
def test_narrow_caches_hold_value_over_scale_rounded_and_clamped(layout, kv_dtype):
    s = step(group_for(layout, kv_dtype), LENGTHS, scales=(0.25, 0.5))
    s.k[0], s.k[1] = 1e6, -1e6
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    storage = KV_DTYPES[kv_dtype]
    info = torch.iinfo(storage) if kv_dtype == "int8" else torch.finfo(storage)
    where = s.batch.slot_mapping
    for i, (stored, new) in enumerate(zip(rows_of(s.cache), (s.k, s.v))):
        scale = 0.5 if i == 1 and not layout.startswith("MLA") else 0.25
        want = (new.view(len(where), *stored.shape[1:]) / scale).clamp(info.min, info.max)
        want = want.round() if kv_dtype == "int8" else want.to(storage).float()
        assert torch.equal(stored.view(torch.uint8)[where].view(storage).float(), want)


def test_scales_per_head():
    per_head = torch.tensor([0.5, 0.25, 2.0])
    s = step(group_for("NHD", "int8"), LENGTHS, scales=(per_head, 4 * per_head))
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    for stored, new, scale in zip(rows_of(s.cache), (s.k, s.v), (per_head, 4 * per_head)):
        assert torch.equal(stored[s.batch.slot_mapping].float(), (new / scale[:, None]).round())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "fp8_e4m3", "int8"])
def test_written_keys_can_be_read_back(layout, kv_dtype):
    """gather_kv gives packed rows in the group's dtype; within what the cache's dtype can hold they are the keys."""
    s = step(group_for(layout, kv_dtype), LENGTHS, scales=(0.03, 0.03) if kv_dtype == "int8" else (1.0, 1.0))
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    lens, starts = torch.tensor(LENGTHS.query, dtype=torch.int32), torch.tensor([8, 0, 28], dtype=torch.int32)
    ragged = s.batch.ragged(lens, causal=False)
    chunk = ContextChunk(
        starts=starts, lens=lens, block_table=s.batch.block_table, page_size=4, batch=ragged, plan=s.plan
    )
    error = {None: 0.0, "bfloat16": 2.0**-8, "fp8_e4m3": 2.0**-4, "int8": 0.0}[kv_dtype]
    for got, new in zip(s.group.gather_kv(s.cache, s.plan, chunk), (s.k, s.v)):
        assert got.dtype == new.dtype
        assert got.shape == new.shape
        allowed = error * new.abs() + {"int8": 0.015001, "fp8_e4m3": 2.0**-9}.get(kv_dtype, 0.0)
        assert bool(((got - new).abs() <= allowed).all())


def test_cross_attention_writes_the_encoders_keys():
    """New keys are not lined up with query tokens: all of the encoder's, on the first step."""
    group = bind(spec(attn_type="cross"), page_size=4, lse=True)
    g = torch.Generator().manual_seed(0)
    block_table, pages = table((7, 10), 4, g)
    where = slots(block_table, (7, 10), (7, 10), 4)
    batch = Batch([1, 3], [7, 10], block_table=block_table, slot_mapping=where, attn_type="cross")
    k, v = (torch.randn(17, 3, 16, generator=g) for _ in range(2))
    cache = group.new_kv_cache(pages)
    group.forward(torch.randn(4, 6, 16, generator=g), k, v, cache, group.plan(batch))
    assert torch.equal(cache.k.flatten(0, 1)[where], k)
    assert torch.equal(cache.v.flatten(0, 1)[where], v)


def test_a_refilled_plan_keeps_the_addresses_that_a_graph_reads():
    """As on an accelerator, where the writer never asks the device which slots are real."""
    s = step(group_for("NHD"), LENGTHS)
    made = kv_write.bind(_elsewhere(s.group.bindings["kv_write"]))
    first = made.plan(s.batch)
    other = s.batch.with_pages(
        s.batch.block_table, s.batch.slot_mapping.flip(0).clone().index_fill_(0, torch.tensor(1), -1)
    )
    again = made.plan(other, out=first)
    assert again is first
    assert first.written.tolist() == [True, False, True, True, True, True]
    assert torch.equal((first.page * 4 + first.place)[first.written], other.slot_mapping[first.written])


def _elsewhere(binding):
    return replace(binding, torch_device=torch.device("meta"))


@pytest.mark.parametrize("kv_dtype", [None, "fp8_e5m2"])
def test_an_engines_own_strided_cache(kv_dtype):
    """k and v interleaved page by page in one tensor, in both layouts; the engine's k and v may be slices too."""
    for layout in ("NHD", "HND"):
        group = bind(spec(), lse=True, page_size=4, kv_layout=layout, kv_cache_dtype=kv_dtype)
        plain = step(group, LENGTHS)
        both = torch.stack(plain.cache.data, 1) if kv_dtype is None else _stacked_bytes(plain.cache.data)
        plain.cache = wrap_kv_cache(both[:, 0], both[:, 1], layout=layout)
        fused = torch.cat([plain.q, plain.k, plain.v], 1)
        plain.q, plain.k, plain.v = fused.split([6, 3, 3], 1)
        plain.check()
    heads_last = torch.randn(11, 3, 4, 32)
    heads_last[0] = 0
    group = bind(spec(), lse=True, page_size=4, kv_layout="HND")
    joined = step(group, Lengths((1, 5), (9, 28)))
    joined.cache = wrap_kv_cache(heads_last[..., :16], heads_last[..., 16:], layout="HND")
    joined.check()


def _stacked_bytes(data):
    return torch.stack([t.view(torch.uint8) for t in data], 1).view(data[0].dtype)
