"""Bound groups: identity, one step function per plan, mixed batches on slices, refilling, and what is refused."""

from __future__ import annotations

import dis
from typing import Any

import pytest
import simple_kernels as sk
import torch
from simple_kernels import NATIVE, PAGE, Pick, causal, dense, group, install, paged, pages_of, spec

from attn_core.errors import AttnCoreError, BadInputError, BindError, MissingKernelError
from attn_core.runtime import Batch, Binding, BoundGroup, Capture, Kernels

APPENDS = frozenset({"appends", "native_out", "strided_out"})


def qkv(batch: Batch, s: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((s.num_heads, s.head_dim), (s.num_kv_heads, s.head_dim), (s.num_kv_heads, s.v_head_dim))
    q, k, v = (torch.randn(batch.num_tokens, *size, generator=g) for size in sizes)
    return q, k, v


def filled(g: BoundGroup, batch: Batch, seed: int = 1) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A cache whose old keys are random, and all keys ``(sum of kv_lens, ...)`` in order for the new k and v."""
    cache = g.new_kv_cache(16)
    gen = torch.Generator().manual_seed(seed)
    for t in cache.data:
        t[1:] = torch.randn(t[1:].shape, generator=gen)
    _, k, v = qkv(batch, g.spec)
    both = []
    for stored, new in ((cache.k, k), (cache.v, v)):
        rows = stored.flatten(0, 1).clone()
        rows[batch.slot_mapping] = new
        both.append(rows[batch.token_indices(PAGE)])
    return cache, both[0], both[1]


def expected(batch: Batch, s: Any, k: torch.Tensor, v: torch.Tensor, sinks: Any = None) -> tuple[Any, Any]:
    """Attention from the definition: every sequence by itself, causal."""
    q, _, _ = qkv(batch, s)
    parts = [
        dense(q[a], k[b], v[b], s.softmax_scale, causal(n, m), sinks, s.alibi_slopes)
        for a, b, n, m in sk.sequences(batch)
    ]
    return torch.cat([o for o, _ in parts]).float(), torch.cat([lse for _, lse in parts]).float()


BATCHES = {
    "decode": ([1, 1, 1], [5, 1, 11]),
    "prefill": ([4, 7], [4, 13]),
    "mixed": ([1, 1, 6, 3], [9, 2, 6, 8]),
}


# the functions an engine holds ----------------------------------------------------------------------------------------


def recording_bind(made: dict[str, Kernels]) -> Any:
    """A bind whose kernels do nothing; ``made`` gets them by role."""

    def bind(b: Binding) -> Kernels:
        def call(*args: Any, **keywords: Any) -> Any:
            return args, keywords

        made[b.role] = Kernels(lambda batch, *, capture=None, out=None: batch, call)
        return made[b.role]

    return bind


def test_attributes_are_the_very_callables_that_bind_returned() -> None:
    made: dict[str, Kernels] = {}
    pick = Pick(bind=install(recording_bind(made)), claims=NATIVE)
    g = group(spec(), prefill=pick, decode=pick, kv_write=pick)
    assert g.prefill is made["prefill"].call
    assert g.decode is made["decode"].call
    assert g.write_kv is made["kv_write"].call
    e = group(spec(attn_type="encoder_only"), encode=pick)
    assert e.encode is made["encode"].call


def test_an_output_with_gaps_reaches_only_kernels_that_claim_it() -> None:
    """Many kernels take the strides of out from its shape and would fill the wrong places."""
    given: list[torch.Tensor | None] = []

    def bind(b: Binding) -> Kernels:
        def call(q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *, out: Any = None, **_: Any) -> Any:
            given.append(out)
            return q + 1 if out is None else out.copy_(q + 1)

        return Kernels(lambda batch, *, capture=None, out=None: batch, call)

    q, wide = torch.randn(2, 6, 8), torch.full((2, 12, 8), 7.0)
    gaps, packed = wide[:, :6], torch.empty(2, 6, 8)
    seen: dict[str, list[bool]] = {}
    for claims in ("", "native_out", "native_out strided_out"):
        pick = Pick(bind=install(bind), claims=frozenset(claims.split()))
        decode = group(spec(), prefill=pick, decode=pick, kv_write=pick).decode
        given.clear()
        for out in (gaps.zero_(), packed.zero_()):
            assert decode(q, None, None, None, None, out=out) is out
            assert torch.equal(out, q + 1)
        assert torch.equal(decode(q, None, None, None, None), q + 1)
        seen[claims] = [out is not None for out in given]
    assert torch.equal(wide[:, 6:], torch.full((2, 6, 8), 7.0))
    assert seen == {
        "": [False, False, False],
        "native_out": [False, True, False],
        "native_out strided_out": [True, True, False],
    }


def test_an_encoders_step_and_an_appending_decodes_step_are_the_kernels_themselves() -> None:
    made: dict[str, Kernels] = {}
    pick = Pick(bind=install(recording_bind(made)), claims=APPENDS)
    e = group(spec(attn_type="encoder_only"), encode=pick)
    assert e.plan(Batch([2, 3], attn_type="encoder_only")).step is made["encode"].call
    g = group(spec(), prefill=pick, decode=pick, kv_write=pick)
    assert g.plan(paged([1, 1], [3, 4])).step is made["decode"].call
    assert g.plan(paged([2], [3])).step is made["prefill"].call


def test_the_hot_path_has_no_loop_no_isinstance_and_no_lookup_by_name() -> None:
    g = group(spec())
    for function in (g.forward, g.plan(paged([1], [3])).step):
        names = {i.argval for i in dis.get_instructions(function) if i.opname.startswith("LOAD_")}
        assert not names & {"isinstance", "getattr", "hasattr", "type", "len"}
        assert not [i for i in dis.get_instructions(function) if "FOR_ITER" in i.opname or "SUBSCR" in i.opname]


def test_a_role_that_the_group_lacks_says_so() -> None:
    e = group(spec(attn_type="encoder_only"))
    with pytest.raises(AttnCoreError, match=r"encoder_only.* has no role decode; its roles are encode"):
        e.decode(None, None, None, None, None)
    only = group(spec(), prefill=None, kv_write=None)
    with pytest.raises(AttnCoreError, match="no role prefill; its roles are decode"):
        only.prefill(None, None, None, None, None)
    with pytest.raises(AttnCoreError, match="no kv_write kernel"):
        only.write_kv(None, None, None, None)


# forward --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("claims", [frozenset(), NATIVE], ids=["copies", "native"])
@pytest.mark.parametrize("unified", [False, True], ids=["two", "unified"])
def test_forward_is_attention_over_old_and_new_keys(kind: str, claims: frozenset[str], unified: bool) -> None:
    s, batch = spec(v_head_dim=5), paged(*BATCHES[kind])
    pick = Pick(claims=claims, unified=unified)
    g = group(s, prefill=pick, decode=pick)
    cache, all_k, all_v = filled(g, batch)
    q, k, v = qkv(batch, s)
    o, lse = expected(batch, s, all_k, all_v)
    got, got_lse = g.forward(q, k, v, cache, g.plan(batch), return_lse=True)
    torch.testing.assert_close(got, o)
    torch.testing.assert_close(got_lse, lse)
    assert got_lse.dtype == torch.float32
    assert got_lse.shape == (batch.num_tokens, s.num_heads)
    out = torch.full_like(o, float("nan"))
    assert g.forward(q, k, v, cache, g.plan(batch), out=out) is out
    torch.testing.assert_close(out, o)


def test_mixed_batches_go_to_two_kernels_on_slices_of_q_and_out() -> None:
    s, batch = spec(), paged([1, 1, 6, 3], [9, 2, 6, 8])
    g = group(s)
    cache, *_ = filled(g, batch)
    q, k, v = qkv(batch, s)
    plan, out = g.plan(batch), torch.empty(11, 6, 8)
    g.forward(q, k, v, cache, plan, out=out)
    (d,), (p,) = plan.decode.calls, plan.prefill.calls
    assert (d.q.data_ptr(), d.q.shape[0]) == (q.data_ptr(), 2)
    assert (p.q.data_ptr(), p.q.shape[0]) == (q[2:].data_ptr(), 9)
    assert (d.out.data_ptr(), p.out.data_ptr()) == (out.data_ptr(), out[2:].data_ptr())
    assert d.k is None, "decode reads the cache"
    assert p.k.data_ptr() == k[2:].data_ptr(), "prefill may read the new keys"
    assert plan.decode.batch is batch.decode_part
    assert plan.prefill.batch is batch.rest_part


def test_a_unified_kernel_is_bound_once_planned_once_and_called_once() -> None:
    sk.BOUND.clear()
    pick = Pick(unified=True, claims=NATIVE)
    g = group(spec(), prefill=pick, decode=pick)
    assert [b.role for b in sk.BOUND] == ["decode", "kv_write"]
    assert g.decode is g.prefill
    batch = paged(*BATCHES["mixed"])
    plan = g.plan(batch)
    assert plan.decode is plan.prefill
    assert plan.decode.batch is batch
    assert plan.decode.fills == 1
    g.forward(*qkv(batch, g.spec), filled(g, batch)[0], plan)
    assert len(plan.decode.calls) == 1


def test_a_unified_row_beside_another_backend_serves_its_own_rows_only() -> None:
    g = group(
        spec(), prefill=Pick(unified=True, backend="other", claims=NATIVE), decode=Pick(unified=True, claims=NATIVE)
    )
    assert not g.unified
    assert g.decode is not g.prefill
    batch = paged(*BATCHES["mixed"])
    assert g.plan(batch).decode.batch.num_seqs == 2


@pytest.mark.parametrize("kind", BATCHES)
def test_kernels_that_append_get_k_and_v_and_no_writer_runs(kind: str) -> None:
    """Claimed per role: write_kv is left out only when every kernel of the step appends."""
    s, batch = spec(), paged(*BATCHES[kind])
    g = group(s, decode=Pick(claims=APPENDS))
    cache, all_k, all_v = filled(g, batch)
    before = cache.k.clone()
    q, k, v = qkv(batch, s)
    plan = g.plan(batch)
    out = g.forward(q, k, v, cache, plan)
    if kind == "decode":
        assert torch.equal(cache.k, before), "the simple kernel does not really append, so nothing was written"
        assert plan.decode.calls[0].k is k
    else:
        torch.testing.assert_close(out, expected(batch, s, all_k, all_v)[0])
    if kind == "mixed":
        assert plan.decode.calls[0].k.data_ptr() == k.data_ptr()
        assert plan.decode.calls[0].k.shape[0] == 2


def test_no_slots_means_the_cache_has_all_keys() -> None:
    s, batch = spec(), paged([1, 3], [5, 7])
    g = group(s)
    cache, all_k, all_v = filled(g, batch)
    q, k, v = qkv(batch, s)
    g.write_kv(k, v, cache, g.plan(batch))
    plan = g.plan(batch.with_pages(batch.block_table, None))
    assert plan.write is None
    torch.testing.assert_close(g.forward(q, None, None, cache, plan), expected(batch, s, all_k, all_v)[0])
    with pytest.raises(BadInputError, match="no slot_mapping to write them to"):
        g.forward(q, k, v, cache, plan)


def test_slots_of_minus_one_are_not_written() -> None:
    s, batch = spec(), paged([3], [3])
    assert batch.slot_mapping is not None
    slots = torch.where(torch.arange(3) == 1, -1, batch.slot_mapping)
    g = group(s)
    cache = g.new_kv_cache(pages_of(batch))
    g.write_kv(torch.ones(3, 2, 8), torch.ones(3, 2, 8), cache, g.plan(batch.with_pages(batch.block_table, slots)))
    assert [int(cache.k.flatten(0, 1)[i].sum()) for i in batch.slot_mapping.tolist()] == [16, 0, 16]


def test_cross_attention_writes_once_and_reads_the_cache() -> None:
    s = spec(attn_type="cross")
    g = group(s)
    table = torch.tensor([[1, 2, 0], [3, 4, 5]], dtype=torch.int32)
    slots = torch.tensor([4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18, 19, 20])  # 5 and 9 encoder tokens
    k, v = torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    cache = g.new_kv_cache(6)
    first = Batch([4, 4], [5, 9], attn_type="cross", block_table=table, slot_mapping=slots)
    plan = g.plan(first)
    q = torch.randn(8, 6, 8)
    out = g.forward(q, k, v, cache, plan)
    assert plan.prefill.calls[0].k is None, "encoder keys do not line up with the queries"
    want = [dense(q[a], k[b], v[b], 8**-0.5, torch.ones(4, m, dtype=torch.bool))[0].float()
            for a, b, m in ((slice(0, 4), slice(0, 5), 5), (slice(4, 8), slice(5, 14), 9))]  # fmt: skip
    torch.testing.assert_close(out, torch.cat(want))
    later = Batch([1, 1], [5, 9], attn_type="cross", block_table=table)
    again = g.forward(q[[3, 7]], None, None, cache, g.plan(later, out=plan))
    torch.testing.assert_close(again, torch.stack([want[0][3], want[1][3]]))


def test_shared_kv_groups_read_and_never_write() -> None:
    s, batch = spec(), paged([1, 4], [3, 6])
    owner, reader = group(s), group(spec(kv_from="full"), name="shared")
    assert "kv_write" not in reader.bindings
    cache, all_k, all_v = filled(owner, batch)
    q, k, v = qkv(batch, s)
    owner.write_kv(k, v, cache, owner.plan(batch))
    before = cache.k.clone()
    plan = reader.plan(batch)
    reader.write_kv(k + 1, v, cache, plan)
    out = reader.forward(q, k + 1, v, cache, plan)
    assert torch.equal(cache.k, before)
    torch.testing.assert_close(out, expected(batch, s, all_k, all_v)[0])


def test_split_queries_are_sliced_as_a_pair() -> None:
    s = spec(kind="mla", num_kv_heads=6, head_dim=12, v_head_dim=8, latent_dim=16, rope_dim=4, nope_dim=8)
    pick = Pick(form="absorbed", claims=NATIVE)
    batch = paged(*BATCHES["mixed"])
    packed = group(s, prefill=pick, decode=pick)
    split = group(s, prefill=pick, decode=pick, values={"mla_query": "split"})
    q, latent, rope = torch.randn(11, 6, 20), torch.randn(11, 16), torch.randn(11, 4)
    cache = packed.new_kv_cache(pages_of(batch))
    a = packed.forward(q, latent, rope, cache, packed.plan(batch))
    plan = split.plan(batch)
    b = split.forward(q.split((16, 4), dim=-1), latent, rope, cache, plan)
    assert a.shape == (11, 6, 16)
    torch.testing.assert_close(a, b)
    assert [t.shape[0] for t in plan.decode.calls[0].q] == [2, 2]
    assert packed.scale == 12**-0.5, "the scale is the model's own, not that of 576 or 20 columns"


def test_indices_and_bias_are_sliced_with_their_rows() -> None:
    s, batch = spec(bias=True, sparse="dsa", topk=2), paged(*BATCHES["mixed"])
    g = group(s)
    plan, cache = g.plan(batch), g.new_kv_cache(pages_of(batch))
    indices, bias = torch.arange(22).view(11, 2), torch.randn(4, 6, 6, 9)
    g.forward(*qkv(batch, s), cache, plan, indices=indices, bias=bias)
    (d,), (p,) = plan.decode.calls, plan.prefill.calls
    assert torch.equal(d.indices, indices[:2])
    assert torch.equal(p.indices, indices[2:])
    assert torch.equal(d.bias, bias[:2])
    assert torch.equal(p.bias, bias[2:])
    g.forward(*qkv(batch, s), cache, plan, indices=indices, bias=bias[:1])
    assert plan.decode.calls[1].bias.shape[0] == plan.prefill.calls[1].bias.shape[0] == 1


# misuse of forward ----------------------------------------------------------------------------------------------------


def test_a_plan_of_another_group_is_refused() -> None:
    g, other = group(spec(), name="full"), group(spec(sliding_window=4), name="window")
    with pytest.raises(BadInputError, match="'full' got a plan of group 'window'"):
        g.forward(None, None, None, g.new_kv_cache(2), other.plan(paged([1], [3])))
    with pytest.raises(BadInputError, match=r"'full': out= is a plan of group 'window'"):
        g.plan(paged([1], [3]), out=other.plan(paged([1], [3])))


@pytest.mark.parametrize(
    ("name", "field"), [("sinks", "sinks=True"), ("indices", "sparse='dsa'"), ("bias", "bias=True")]
)
def test_what_no_kernel_was_chosen_for_is_refused_not_dropped(name: str, field: str) -> None:
    g = group(spec())
    with pytest.raises(BadInputError, match=rf"got {name}, but its AttentionSpec does not say {field}"):
        g.forward(None, None, None, g.new_kv_cache(2), g.plan(paged([1], [3])), **{name: torch.zeros(1)})


def test_forgotten_sinks_are_refused() -> None:
    g = group(spec(sinks=True))
    with pytest.raises(BadInputError, match="needs sinks=prepare_sinks"):
        g.forward(None, None, None, g.new_kv_cache(2), g.plan(paged([1], [3])))


@pytest.mark.parametrize(
    ("layout", "page", "says"),
    [("HND", 4, "layout 'HND' with pages of 4.*reads 'NHD' with pages of 4"), ("NHD", 8, "pages of 8.*pages of 4")],
)
def test_a_cache_of_another_shape_is_refused(layout: str, page: int, says: str) -> None:
    g = group(spec())
    other = group(spec(), values={"kv_layout": layout, "page_size": page}).new_kv_cache(4)
    with pytest.raises(BadInputError, match=says):
        g.forward(None, None, None, other, g.plan(paged([1], [3])))


# plans ----------------------------------------------------------------------------------------------------------------


def test_refilling_keeps_the_plan_and_the_kernels_own_plans() -> None:
    s = spec()
    g = group(s)
    plan = g.plan(paged(*BATCHES["mixed"]))
    held = plan.decode, plan.prefill, plan.write
    for kind in ("decode", "prefill", "mixed"):
        batch = paged(*BATCHES[kind], seed=3)
        assert g.plan(batch, out=plan) is plan
        cache, all_k, all_v = filled(g, batch)
        torch.testing.assert_close(g.forward(*qkv(batch, s), cache, plan), expected(batch, s, all_k, all_v)[0])
    assert (plan.decode, plan.prefill, plan.write) == held, "workspaces survive steps that did without them"
    assert [p.fills for p in held] == [3, 3, 4]


def test_a_step_without_a_role_shows_no_stale_kernel_plan() -> None:
    g = group(spec())
    plan = g.plan(paged(*BATCHES["mixed"]))
    g.plan(paged(*BATCHES["decode"]), out=plan)
    assert plan.prefill is None
    assert plan.decode is not None
    g.plan(paged(*BATCHES["prefill"]), out=plan)
    assert plan.decode is None


def test_plans_share_nothing() -> None:
    g = group(spec())
    a, b = g.plan(paged([1], [3])), g.plan(paged([1], [3]))
    assert a is not b
    assert a.decode is not b.decode
    assert a.write is not b.write


def test_a_refused_batch_leaves_the_plan_as_it_was() -> None:
    g = group(spec())
    batch = paged(*BATCHES["decode"])
    plan = g.plan(batch)
    step = plan.step
    with pytest.raises(BadInputError):
        g.plan(Batch([1], [1], attn_type="cross"), out=plan)
    assert plan.batch is batch
    assert plan.step is step


def test_a_failed_refill_leaves_nothing_half_filled() -> None:
    fail = []

    def bind(b: Binding) -> Kernels:
        kernels = sk.bind(b)

        def plan(batch: Batch, *, capture: Any = None, out: Any = None) -> Any:
            if fail and b.role == "prefill":
                raise RuntimeError("out of workspace")
            return kernels.plan(batch, capture=capture, out=out)

        return Kernels(plan, kernels.call)

    g = group(spec(), prefill=Pick(bind=install(bind), claims=NATIVE))
    batch = paged(*BATCHES["mixed"])
    plan = g.plan(batch)
    held = plan.prefill
    fail.append(True)
    with pytest.raises(RuntimeError, match="out of workspace"):
        g.plan(paged(*BATCHES["mixed"], seed=1), out=plan)
    assert plan.batch is plan.decode is plan.prefill is plan.write is None
    with pytest.raises(AttnCoreError, match="holds no step"):
        g.forward(*qkv(batch, g.spec), filled(g, batch)[0], plan)
    fail.clear()
    assert g.plan(batch, out=plan).prefill is held


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], Batch, str]] = [
    ("type", {}, {}, Batch([1], [1], attn_type="cross"), "Batch(..., attn_type='decoder')"),
    ("device", {}, {}, Batch([1], [1], device="meta"), "bound for cpu"),
    ("table", {}, {}, Batch([1], [1]), "no block_table"),
    ("width", {}, {}, paged([4], [8], decode_width=4), "resolve with verify_width=4"),
    ("tree", {}, {"verify_width": 2},
     paged([2], [8], decode_width=2, tree_mask=torch.ones(1, 2, 2, dtype=torch.bool)), "resolve with tree_mask=True"),
    ("bounds", {}, {}, paged([1], [8], kv_lens_device=torch.ones(1, dtype=torch.int32), exact=False),
     "resolve with host_lengths='bounds'"),
    ("spans", {}, {}, paged([4], [8], bidirectional_spans=[[(4, 8)]]), "resolve with bidirectional_prefix=True"),
    ("seqs", {}, {"max_num_seqs": 1}, paged([1, 1], [2, 2]), "max_num_seqs=1"),
    ("length", {}, {"max_model_len": 7}, paged([1], [8]), "max_model_len=7"),
    ("narrow", {}, {}, Batch([1], [9], block_table=torch.ones(1, 2, dtype=torch.int32)), "needs 3 pages of 4"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "options", "batch", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_batches_that_no_kernel_was_chosen_for(
    fields: dict[str, Any], options: dict[str, Any], batch: Batch, says: str
) -> None:
    with pytest.raises(BadInputError) as caught:
        group(spec(**fields), options=options).plan(batch)
    assert (says in str(caught.value) and "plan of group 'full'" in str(caught.value)) or "Batch: " in str(caught.value)


def test_claimed_batches_pass() -> None:
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    g = group(spec(bidirectional_prefix=True), options={"verify_width": 2, "tree_mask": True, "host_lengths": "bounds"})
    g.plan(paged([2], [8], decode_width=2, tree_mask=mask, bidirectional_spans=[[(0, 3)]]))
    g.plan(paged([1], [8], kv_lens_device=torch.ones(1, dtype=torch.int32), exact=False))


def test_pages_are_checked_against_the_largest_cache_in_use() -> None:
    g = group(spec())
    batch = paged([1, 1], [9, 5])
    g.plan(batch)
    small = g.new_kv_cache(pages_of(batch) - 1)
    with pytest.raises(BadInputError, match=r"block_table\[\d, \d\]=5, but the cache has pages 0 to 4"):
        g.plan(batch)
    large = g.new_kv_cache(pages_of(batch))
    plan = g.plan(batch)
    assert plan.num_pages == large.num_pages == 6
    with pytest.raises(BadInputError, match="uses pages up to 5, but the cache has 5 pages"):
        g.forward(None, None, None, small, plan)
    del large, small
    g.plan(batch)


# capture --------------------------------------------------------------------------------------------------------------


def test_capture_reaches_the_kernels_and_later_batches_are_padded_to_it() -> None:
    g = group(spec(), values={"graph": "decode"}, options={"verify_width": 2})
    capture = Capture(4, 2, 16)
    plan = g.plan(paged([2, 2], [6, 9], decode_width=2), capture=capture)
    assert plan.capture is capture
    assert plan.decode.capture is capture
    assert plan.write.capture is capture
    held = plan.decode
    g.plan(paged([2], [5], decode_width=2), out=plan)
    assert plan.decode is held
    assert held.fills == 2
    assert plan.batch is not None
    assert plan.batch.kv_lens.tolist() == [5, 1, 1, 1]
    assert plan.batch.slot_mapping is not None
    assert plan.batch.slot_mapping.tolist()[2:] == [-1] * 6
    cache = g.new_kv_cache(pages_of(plan.batch))
    out = g.forward(torch.randn(8, 6, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8), cache, plan)
    assert out.shape == (8, 6, 8)
    assert out.isfinite().all()
    assert cache.k[0].eq(0).all(), "the null page stays clean"


def test_what_a_capture_cannot_serve() -> None:
    capture = Capture(2, 1, 16)
    with pytest.raises(BadInputError, match="resolve with graph='decode' or 'full'"):
        group(spec()).plan(paged([1], [3]), capture=capture)
    g = group(spec(), values={"graph": "full"})
    for batch in (paged([1, 1, 1], [2, 2, 2]), paged([1], [17]), paged([1, 2], [2, 2])):
        with pytest.raises(BadInputError, match="does not fit Capture"):
            g.plan(batch, capture=capture)
    with pytest.raises(BadInputError, match="out= was made for None"):
        g.plan(paged([1], [3]), capture=capture, out=g.plan(paged([1], [3])))
    with pytest.raises(BadInputError, match="max_seqs=0"):
        Capture(0, 1, 1)


# binding --------------------------------------------------------------------------------------------------------------


def test_a_binding_says_all_that_was_decided() -> None:
    sk.BOUND.clear()
    s = spec(num_heads=6, num_kv_heads=3, head_dim=8, sliding_window=5, alibi_slopes=(1.0, 0.5, 0.25, 0.125, 0.1, 0.05))
    values = {"kv_cache_dtype": "fp8_e5m2", "kv_layout": "NHD", "page_size": 16, "graph": "full"}
    group(s, values=values, options={"lse": True})
    by_role = {b.role: b for b in sk.BOUND}
    assert set(by_role) == {"prefill", "decode", "kv_write"}
    b = by_role["decode"]
    assert (b.num_heads, b.num_kv_heads, b.head_dim, b.v_head_dim) == (6, 3, 8, 8)
    assert (b.dtype, b.kv_dtype, b.kv_cache_dtype) == (torch.float32, torch.float8_e5m2, "fp8_e5m2")
    assert (b.kv_layout, b.page_size, b.graph, b.mla_query) == ("NHD", 16, "full", "packed")
    assert (b.scale, b.sliding_window, b.alibi_slopes) == (8**-0.5, 5, s.alibi_slopes)
    assert b.options.lse
    assert b.torch_device == torch.device("cpu")
    assert b.backend == "simple"
    sk.BOUND.clear()
    group(spec(attn_type="encoder_only"))
    (e,) = sk.BOUND
    assert (e.role, e.kv_dtype, e.kv_layout, e.page_size, e.kv_cache_dtype) == ("encode", None, None, None, None)


def test_rank_slopes_win_over_the_specs() -> None:
    from attn_core.runtime import bind_group
    from attn_core.spec import EngineOptions

    sk.BOUND.clear()
    s = spec(num_heads=2, num_kv_heads=2, attn_type="encoder_only", alibi_slopes=(1.0, 0.5))
    bind_group(
        "enc", s, {"encode": Pick()}, {}, EngineOptions(), sk.CPU, torch.device("cpu"), alibi_slopes=(0.25, 0.125)
    )
    assert sk.BOUND[0].alibi_slopes == (0.25, 0.125)


def raising(error: Exception) -> Any:
    def bind(b: Binding) -> Kernels:
        raise error

    return bind


@pytest.mark.parametrize(
    ("bind", "says"),
    [
        ("no_such_module:bind", r"ModuleNotFoundError.*no_such_module"),
        ("simple_kernels:no_such_function", "AttributeError"),
        ("simple_kernels:PAGE", "TypeError: 'int' object is not callable"),
        (install(raising(ValueError("bad tile"))), "ValueError: bad tile"),
        (install(lambda b: (b, b)), r"returned tuple; expected Kernels\(plan, call\)"),
        (None, "names no bind function"),
    ],
)
def test_bind_failures_name_backend_role_group_and_bind_string(bind: str | None, says: str) -> None:
    with pytest.raises(BindError, match=says) as caught:
        group(spec(), name="window", decode=Pick(backend="acme", bind=bind))
    text = str(caught.value)
    assert not isinstance(caught.value, MissingKernelError)
    assert all(part in text for part in ("'acme'", "decode", "'window'", bind or "bind"))


def test_a_missing_kernel_passes_through() -> None:
    error = MissingKernelError("acme-kernels is not installed")
    with pytest.raises(MissingKernelError) as caught:
        group(spec(), decode=Pick(bind=install(raising(error))))
    assert caught.value is error


def test_contradictions_between_roles_do_not_bind() -> None:
    with pytest.raises(BindError, match="disagree on the cache's"):
        group(spec(), decode=Pick(head_dim=16))
    with pytest.raises(BindError, match="cannot pad 6 heads"):
        group(spec(), decode=Pick(num_heads=7))
    with pytest.raises(BindError, match="neither shared KV"):
        group(spec(kv_from="full"), decode=Pick(claims=APPENDS))
    with pytest.raises(BindError, match="no attention role was decided, only kv_write"):
        group(spec(), prefill=None, decode=None)


def test_gather_belongs_to_the_writer() -> None:
    s, batch = spec(), paged([2], [6])
    g = group(s)
    cache, _all_k, _all_v = filled(g, batch)
    with pytest.raises(AttnCoreError, match="offers no gather_kv"):
        group(s, kv_write=Pick(bind=install(recording_bind({})))).gather_kv(cache, g.plan(batch), None)  # type: ignore[arg-type]
