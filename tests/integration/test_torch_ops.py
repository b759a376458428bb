"""The operators against the bound functions they stand for, torch's own checks of operators, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.library import opcheck

from attn_core import AttentionSpec, AttnCoreError, BadInputError, Batch, ModelSpec, get_platform, merge_state
from attn_core.integrations.torch_ops import Slot
from attn_core.runtime import BoundGroup, KVCache

OPS: Any = torch.ops.attn_core
PAGES = 24


def bind(**fields: Any) -> BoundGroup:
    shape = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "dtype": "float32", "page_size": 4, **fields}
    (group,) = get_platform("cpu").attention_backend(**shape).groups.values()
    return group


def batch(query: list[int], kv: list[int], *, page_size: int = 4, write: bool = True, **rest: Any) -> Batch:
    """Pages from the top down, so that tables are no ranges."""
    counts = [-(-n // page_size) for n in kv]
    ids = iter(range(PAGES - 1, 0, -1))
    table = torch.zeros(len(kv), max(counts), dtype=torch.int32)
    for row, n in enumerate(counts):
        table[row, :n] = torch.tensor([next(ids) for _ in range(n)])
    slots = [
        int(table[row, p // page_size]) * page_size + p % page_size
        for row, (n, m) in enumerate(zip(query, kv))
        for p in range(m - n, m)
    ]
    mapping = torch.tensor(slots) if write else None
    return Batch(query, kv, block_table=table, slot_mapping=mapping, **rest)


MIXED = ([1, 1, 5, 3], [9, 1, 5, 11])


def filled(group: BoundGroup, **scales: Any) -> KVCache:
    cache = group.new_kv_cache(PAGES, **scales)
    for t in cache.data:
        t[1:] = torch.randn(t[1:].shape).to(t.dtype)
    return cache


def copy(cache: KVCache) -> list[torch.Tensor]:
    return [t.clone() for t in cache.data]


def qkv(tokens: int, group: BoundGroup) -> tuple[torch.Tensor, ...]:
    s = group.spec
    heads = ((s.num_heads, s.head_dim), (s.num_kv_heads, s.head_dim), (s.num_kv_heads, s.v_head_dim))
    return tuple(torch.randn(tokens, *h) for h in heads)


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unequal widths": {"v_head_dim": 8},
    "window, cap, sinks": {"sliding_window": 4, "logit_softcap": 5.0, "sinks": True},
    "heads first": {"kv_layout": "HND"},
    "pages of one": {"page_size": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_bound_forward(case):
    group = bind(lse=True, **CASES[case])
    size = group.page_size
    b = batch(*(MIXED if size > 1 else ([1, 3], [7, 9])), page_size=size)
    q, k, v = qkv(b.num_tokens, group)
    cache = filled(group)
    sinks = group.prepare_sinks(torch.randn(6)) if group.spec.sinks else None
    slot, plan = Slot(group), group.plan(b)
    mine, others = copy(cache), copy(cache)
    want, want_lse = group.forward(q, k, v, cache, plan, sinks=sinks, return_lse=True)
    with slot.using(plan):
        got = OPS.forward(q, k, v, mine, slot.handle, sinks=sinks)
        out = torch.full_like(want, torch.nan)
        OPS.forward_out(q, k, v, others, slot.handle, out=out, sinks=sinks)
        again, lse = OPS.forward_lse(q, k, v, others, slot.handle, sinks=sinks)
    for result in (got, out, again):
        assert torch.equal(result, want)
        assert result.is_contiguous()
    assert torch.equal(lse, want_lse)
    for data in (mine, others):
        assert all(map(torch.equal, data, cache.data))
    assert slot.plan is None


def test_write_and_read_apart():
    group = bind()
    b = batch([1, 1, 5], [9, 4, 5])
    q, k, v = qkv(7, group)
    cache = filled(group)
    data, slot = copy(cache), Slot(group)
    want = group.forward(q, k, v, cache, group.plan(b))
    slot.set(group.plan(b))
    OPS.write_kv(k, v, data, slot.handle)
    assert all(map(torch.equal, data, cache.data))
    slot.set(group.plan(b.with_pages(b.block_table, None), out=slot.plan))
    assert torch.equal(OPS.forward(q, None, None, data, slot.handle), want)
    with pytest.raises(BadInputError, match="writes nothing"):
        OPS.write_kv(k, v, data, slot.handle)


def test_mla_with_q_in_one_and_in_two_parts():
    sizes = {"nope_dim": 16, "rope_dim": 8, "head_dim": 24, "v_head_dim": 16, "latent_dim": 32}
    group = bind(kind="mla", num_kv_heads=6, **sizes)
    b, cache = batch([1, 1], [9, 6]), filled(group)
    q, latent, rope = torch.randn(2, 6, 40), torch.randn(2, 32), torch.randn(2, 8)
    slot, data = Slot(group), copy(cache)
    slot.set(group.plan(b))
    if group.mla_query == "packed":
        given: dict[str, Any] = {}
        whole: Any = q
    else:
        given, whole = {"q_rope": q[..., 32:]}, (q[..., :32], q[..., 32:])
    want = group.forward(whole, latent, rope, cache, slot.plan)
    got = OPS.forward(q if not given else q[..., :32], latent, rope, data, slot.handle, **given)
    assert got.shape == (2, 6, 32)
    assert torch.equal(got, want)
    assert torch.equal(data[0], cache.data[0])


def test_quantised_cache_with_scales_per_head_and_whole():
    group = bind(kv_cache_dtype="fp8_e4m3")
    b = batch(*MIXED)
    q, k, v = qkv(b.num_tokens, group)
    for k_scale, v_scale in ((torch.tensor(0.5), torch.tensor(2.0)), (torch.tensor([0.5, 1.0, 2.0]), torch.ones(3))):
        cache, slot = filled(group, k_scale=k_scale, v_scale=v_scale), Slot(group)
        data = copy(cache)
        want = group.forward(q, k, v, cache, group.plan(b))
        with slot.using(group.plan(b)):
            got = OPS.forward(q, k, v, data, slot.handle, k_scale=k_scale, v_scale=v_scale)
            bare = OPS.forward(q, k, v, copy(cache), slot.handle)
        assert torch.equal(got, want)
        assert not torch.allclose(bare, want)
        assert torch.equal(data[0].view(torch.uint8), cache.data[0].view(torch.uint8))


def test_encode():
    group = bind(attn_type="encoder_only", page_size=None)
    q, k, v = qkv(9, group)
    plan, slot = group.plan(Batch([4, 5], attn_type="encoder_only")), Slot(group)
    with slot.using(plan):
        assert torch.equal(OPS.encode(q, k, v, slot.handle), group.forward(q, k, v, None, plan))
        with pytest.raises(BadInputError, match="keeps none"):
            OPS.forward(q, k, v, [], slot.handle)
    decoder = Slot(bind())
    with pytest.raises(BadInputError, match="call attn_core::forward"):
        OPS.encode(q, k, v, decoder.handle)


def test_cross_attention_keeps_all_the_encoders_keys():
    group = bind(attn_type="cross")
    table = torch.tensor([[3, 5, 2]], dtype=torch.int32)
    keys = torch.tensor([12, 13, 14, 15, 20, 21, 22, 23, 8])
    b = Batch([2], [9], block_table=table, slot_mapping=keys, attn_type="cross")
    q, (k, v) = torch.randn(4, 6, 16), qkv(9, group)[1:]
    cache, slot = filled(group), Slot(group)
    slot.set(group.plan(b))
    got = OPS.forward(q, k, v, copy(cache), slot.handle)
    assert torch.equal(got[:2], group.forward(q[:2], k, v, cache, slot.plan))
    assert not got[2:].any()


def test_rows_beyond_the_step_are_zeros():
    group = bind(lse=True)
    b, more = batch(*MIXED), 6
    q, k, v = qkv(b.num_tokens + more, group)
    cache, slot, n = filled(group), Slot(group), b.num_tokens
    data = copy(cache)
    slot.set(group.plan(b))
    want, want_lse = group.forward(q[:n], k[:n], v[:n], cache, slot.plan, return_lse=True)
    got, lse = OPS.forward_lse(q, k, v, data, slot.handle)
    out = torch.full_like(got, torch.nan)
    OPS.forward_out(q, k, v, data, slot.handle, out=out)
    OPS.write_kv(k, v, data, slot.handle)
    for result in (got, out):
        assert torch.equal(result[:n], want)
        assert not result[n:].any()
    assert torch.equal(lse[:n], want_lse)
    assert torch.all(lse[n:] == -torch.inf)
    assert all(map(torch.equal, data, cache.data))
    with pytest.raises(BadInputError, match="10 tokens, q has 9"):
        OPS.forward(q[:9], k[:9], v[:9], data, slot.handle)


@pytest.mark.parametrize("op", ["forward", "forward_lse", "forward_out", "encode", "write_kv"])
def test_torchs_own_checks(op):
    """Schema, fake, autograd registration, and tracing with dynamic shapes."""
    encoder = op == "encode"
    group = bind(attn_type="encoder_only", page_size=None) if encoder else bind(lse=True, sinks=True)
    slot = Slot(group)
    b = Batch([7, 3], attn_type="encoder_only") if encoder else batch(*MIXED)
    slot.set(group.plan(b))
    q, k, v = qkv(b.num_tokens, group)
    extras: dict[str, Any] = {} if op in ("encode", "write_kv") else {"sinks": group.prepare_sinks(torch.randn(6))}
    if op == "forward_out":
        extras["out"] = torch.zeros(b.num_tokens, 6, 16)
    cache = () if encoder else (list(filled(group).data),)
    args = (*((k, v) if op == "write_kv" else (q, k, v)), *cache, slot.handle)
    report = opcheck(getattr(OPS, op).default, args, extras)
    assert len(report) >= 4
    assert set(report.values()) == {"SUCCESS"}


def test_what_is_mutated_is_declared():
    schemas = {name: getattr(OPS, name).default._schema for name in ("forward", "forward_out", "forward_lse", "encode")}
    written = {
        name: [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        for name, schema in schemas.items()
    }
    cache = ["kv_cache"]
    assert written == {"forward": cache, "forward_lse": cache, "forward_out": ["kv_cache", "out"], "encode": []}


def test_slots_live_as_long_as_they_are_kept():
    group = bind()
    slot, q = Slot(group), qkv(2, group)
    handle, data = slot.handle, list(group.new_kv_cache(PAGES).data)
    with pytest.raises(AttnCoreError, match=r"holds no plan; call slot.set"):
        OPS.forward(*q, data, handle)
    slot.set(group.plan(batch([1, 1], [4, 6])))
    OPS.forward(*q, data, handle)
    gone = weakref.ref(group)
    del slot, group
    gc.collect()
    assert gone() is None
    with pytest.raises(BadInputError, match=f"no slot '{handle}'.*keep Slot"):
        OPS.forward(*q, data, handle)


def test_names():
    group = bind()
    a, b = Slot(group), Slot(group)
    assert a.handle != b.handle
    named = Slot(group, "decode")
    assert named.handle == "decode"
    with pytest.raises(BadInputError, match="'decode' exists already"):
        Slot(group, "decode")
    del named
    gc.collect()
    assert Slot(group, "decode").handle == "decode"


def test_a_plan_of_another_group_is_refused():
    a, b = bind(), bind(sliding_window=4)
    slot = Slot(a)
    with pytest.raises(BadInputError, match="each group has its own slots"):
        slot.set(b.plan(batch(*MIXED)))
    assert slot.plan is None


def test_a_plan_whose_refill_failed_is_refused():
    group = bind()
    slot = Slot(group)
    slot.set(group.plan(batch(*MIXED)))
    slot.plan.clear()
    with pytest.raises(AttnCoreError, match="holds no step"):
        OPS.forward(*qkv(10, group), copy(filled(group)), slot.handle)


@pytest.mark.parametrize("wrong", ["layout", "page size", "dtype", "one tensor"])
def test_a_cache_of_another_shape_is_refused(wrong):
    group = bind()
    slot = Slot(group)
    slot.set(group.plan(batch(*MIXED)))
    data = copy(filled(group))
    data = {
        "layout": [t.transpose(1, 2).contiguous() for t in data],
        "page size": [t.view(-1, 8, 3, 16) for t in data],
        "dtype": [t.bfloat16() for t in data],
        "one tensor": data[:1],
    }[wrong]
    with pytest.raises(BadInputError, match="kv_cache has"):
        OPS.forward(*qkv(10, group), data, slot.handle)


def test_sinks_are_not_dropped():
    group = bind(sinks=True)
    slot = Slot(group)
    slot.set(group.plan(batch(*MIXED)))
    with pytest.raises(BadInputError, match="needs sinks"):
        OPS.forward(*qkv(10, group), copy(filled(group)), slot.handle)


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks"])
def test_forward_only(which):
    group = bind(sinks=True)
    slot, data = Slot(group), copy(filled(group))
    slot.set(group.plan(batch(*MIXED)))
    given = dict(zip(("q", "k", "v"), qkv(10, group)), sinks=torch.randn(6))
    given[which].requires_grad_()
    OPS.forward(**given, kv_cache=data, slot=slot.handle)
    with torch.enable_grad(), pytest.raises(AttnCoreError, match="no backward; run under"):
        OPS.forward(**given, kv_cache=data, slot=slot.handle)


def test_own_sinks_per_role():
    """Kernels whose sinks differ get a mapping from prepare_sinks; the operator takes its two tensors."""
    model = ModelSpec.of(None, num_heads=6, num_kv_heads=3, head_dim=16, dtype="float32", sinks=True)
    group = get_platform("cpu").attention_backend(model, page_size=4).groups["full"]
    seen: list[Any] = []
    group.forward = lambda *a, sinks=None, out=None, **_: seen.append(sinks) or out  # type: ignore[method-assign]
    slot = Slot(group)
    slot.set(group.plan(batch(*MIXED)))
    a, b = torch.randn(6), torch.randn(6)
    OPS.forward(*qkv(10, group), copy(filled(group)), slot.handle, sinks=a, decode_sinks=b)
    assert set(seen[0]) == {"prefill", "decode"}
    assert torch.equal(seen[0]["prefill"], a)
    assert torch.equal(seen[0]["decode"], b)


def test_merge_state_needs_no_operator():
    o, lse = torch.randn(2, 5, 6, 16), torch.randn(2, 5, 6)
    compiled = torch.compile(merge_state, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(o[0], lse[0], o[1], lse[1]), merge_state(o[0], lse[0], o[1], lse[1]))


def test_a_group_that_reads_anothers_cache():
    fields = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "dtype": "float32"}
    model = ModelSpec(groups={"full": AttentionSpec(**fields), "shared": AttentionSpec(**fields, kv_from="full")})
    groups = get_platform("cpu").attention_backend(model, page_size=4).groups
    cache, b = filled(groups["full"]), batch(*MIXED)
    q, k, v = qkv(b.num_tokens, groups["full"])
    slots, data = {name: Slot(group) for name, group in groups.items()}, list(cache.data)
    for name, group in groups.items():
        slots[name].set(group.plan(b))
    want = OPS.forward(q, k, v, data, slots["full"].handle)
    written = copy(cache)
    assert torch.equal(OPS.forward(q, None, None, data, slots["shared"].handle), want)
    OPS.write_kv(k + 1, v + 1, data, slots["shared"].handle)
    assert all(map(torch.equal, data, written))
