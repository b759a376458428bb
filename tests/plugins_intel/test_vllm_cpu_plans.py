"""Plans, outputs and refusals of ``vllm_cpu``: what an engine may do between and around the calls."""

from __future__ import annotations

import pytest
import torch
from vllm_cpu_cases import MIXED, bind, spec, step

from attn_core import BadInputError
from attn_core.runtime import Batch
from numerics.kernel_cases import Lengths

pytestmark = pytest.mark.usefixtures("vllm_cpu")
FIELDS = {"dtype": "bfloat16", "sliding_window": 60, "sinks": True}
OTHER = Lengths((1, 1, 33), (500, 1, 70))


def test_a_plan_is_refilled_in_place() -> None:
    group = bind(spec(**FIELDS))
    first = step(group, MIXED)
    plan, kernel_plan = first.plan, first.plan.decode
    for seed, lengths in enumerate((OTHER, Lengths((1,), (64,)), MIXED, Lengths((200,), (200,)))):
        again = step(group, lengths, seed=seed, plan=plan)
        again.check()
        assert again.plan is plan
        assert again.plan.decode is kernel_plan


def test_a_plan_serves_every_layer() -> None:
    """The same lengths and pages, other tensors; and the same again, bit for bit."""
    group = bind(spec(**FIELDS))
    one = step(group)
    first = one.check()
    for seed in (1, 2):
        other = step(group, seed=seed)
        q, k, v, cache, plan = other.q, other.k, other.v, other.cache, group.plan(other.batch)
        for _ in range(2):
            out = group.forward(q, k, v, cache, plan, sinks=group.prepare_sinks(other.extra["sinks"]))
            assert not other.wrong(out)
    torch.testing.assert_close(one.run(), first, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_batches_in_flight(threads: int) -> None:
    """A large and a small step, planned first, run in turn: neither's plan or scratch space is the other's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        groups = [bind(spec(**FIELDS)), bind(spec(num_heads=4, num_kv_heads=1, head_dim=128, dtype="bfloat16"))]
        steps = [
            step(g, lengths, seed=i) for i, (g, lengths) in enumerate(zip(groups * 2, (MIXED, OTHER, OTHER, MIXED)))
        ]
        for _ in range(2):
            for one in (*steps, *reversed(steps)):
                one.check()
    finally:
        torch.set_num_threads(before)


def test_a_plan_is_for_the_threads_it_was_made_with() -> None:
    """The library says so itself, before it computes anything."""
    before = torch.get_num_threads()
    one = step(bind(spec(**FIELDS)), Lengths((1, 1), (3000, 40)))
    torch.set_num_threads(before + 2)
    try:
        with pytest.raises(RuntimeError, match="thread_num"):
            one.run()
        one.plan = one.group.plan(one.batch, out=one.plan)
        one.check()
    finally:
        torch.set_num_threads(before)


def test_out_is_filled_without_a_copy() -> None:
    one = step(bind(spec(dtype="bfloat16")))
    out = torch.full_like(one.q, torch.nan)
    assert one.run(out=out) is out
    assert not one.wrong(out)


def test_out_with_gaps_is_filled_too() -> None:
    one = step(bind(spec()))
    room = torch.full((one.q.shape[0], 2, *one.q.shape[1:]), 7.0)
    assert one.run(out=room[:, 0]) is not None
    assert not one.wrong(room[:, 0])
    assert bool((room[:, 1] == 7.0).all())


def test_q_k_and_v_may_be_views_of_one_tensor() -> None:
    one = step(bind(spec(dtype="bfloat16")))
    fused = torch.cat((one.q, one.k, one.v), 1)
    one.q, one.k, one.v = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    assert one.q.stride(0) == 10 * 64
    one.check()


def test_negative_slots_are_not_written() -> None:
    group = bind(spec())
    one = step(group)
    before = one.cache.data[0].clone()
    slots = torch.full_like(one.batch.slot_mapping, -1)
    group.write_kv(one.k, one.v, one.cache, group.plan(one.batch.with_pages(one.batch.block_table, slots)))
    assert torch.equal(one.cache.data[0], before)


def test_more_keys_than_slots() -> None:
    """Engines pad their tensors; what has no slot is not written."""
    group = bind(spec())
    one = step(group)
    padded = [torch.cat((x, torch.full_like(x[:9], torch.nan))) for x in (one.k, one.v)]
    group.write_kv(*padded, one.cache, one.plan)
    one.k, one.v = None, None
    got = group.decode(one.q, None, None, one.cache, one.plan)
    assert not one.wrong(got)


def test_a_block_table_may_be_a_view() -> None:
    group = bind(spec())
    one = step(group)
    table = one.batch.block_table
    spaced = torch.stack((table, torch.full_like(table, 10**6)), -1)[..., 0]  # last axis with gaps
    assert spaced.stride(1) == 2
    one.plan = group.plan(one.batch.with_pages(spaced, one.batch.slot_mapping))
    one.check()


def test_decode_alone_as_in_disaggregated_serving() -> None:
    group = bind(spec(sinks=True))
    one = step(group, Lengths((1, 1), (97, 40)))
    sinks = group.prepare_sinks(one.extra["sinks"])
    group.write_kv(one.k, one.v, one.cache, one.plan)
    assert not one.wrong(group.decode(one.q, None, None, one.cache, one.plan, sinks=sinks))


@pytest.mark.parametrize("wrong", ["q", "k", "lse", "cache"])
def test_what_the_library_would_take_and_get_wrong_is_refused(wrong: str) -> None:
    group = bind(spec())
    one = step(group)
    other = step(bind(spec(dtype="bfloat16")))
    given = {"q": one.q, "k": one.k, "v": one.v, "kv_cache": one.cache, "plan": one.plan}
    if wrong == "cache":
        given["kv_cache"] = other.cache
    elif wrong != "lse":
        given[wrong] = given[wrong].bfloat16()
    with pytest.raises(BadInputError, match="LSE" if wrong == "lse" else "bfloat16"):
        group.forward(**given, return_lse=wrong == "lse")


def test_a_batch_without_pages_is_refused() -> None:
    group = bind(spec())
    with pytest.raises(BadInputError, match="block_table"):
        group.plan(Batch([1], [5]))
