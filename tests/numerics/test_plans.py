"""What an engine does with plans: refills them, holds several, and expects results that depend on nothing else."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MIXED, Lengths, bind, encode_step, mla_spec, spec, step

from attn_core.backends.torch_native import sources, steps
from attn_core.runtime import Batch

OTHER = Lengths((1, 1, 30, 6), (70, 3, 33, 90))
MAKERS = {
    "heads": lambda: bind(spec(sliding_window=9, sinks=True), lse=True, page_size=4),
    "bands": lambda: bind(spec(alibi_slopes=(0.5, 0.2, 0.1, 0.05, 0.02, 0.01)), lse=True, page_size=4),
    "latent": lambda: bind(mla_spec(), form="absorbed", lse=True, page_size=4),
    "int8": lambda: bind(spec(v_head_dim=24), lse=True, page_size=4, kv_cache_dtype="int8"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_refilled_plan_is_as_good_as_a_new_one(kind):
    group = MAKERS[kind]()
    scales = (0.02, 0.02) if kind == "int8" else (1.0, 1.0)
    kept = step(group, MIXED, scales=scales).plan
    for seed, lengths in enumerate((OTHER, MIXED, OTHER, Lengths((1,), (5,)), MIXED)):
        s = step(group, lengths, seed=seed, scales=scales)
        want = s.run()
        s.plan = group.plan(s.batch, out=kept)
        assert s.plan is kept
        assert torch.equal(s.run(), want)
        s.check()


def test_buffers_survive_a_refill(monkeypatch):
    """The steady state allocates no buffer: every step finds the room the first one made."""
    group = MAKERS["int8"]()
    s = step(group, OTHER)
    s.run()
    made = []
    monkeypatch.setattr(sources.torch, "zeros", lambda *a, **k: made.append(a) or pytest.fail("a new buffer"))
    group.plan(s.batch, out=s.plan)
    s.run()
    assert not made


def test_plans_in_flight_share_nothing():
    group = MAKERS["heads"]()
    a, b = step(group, MIXED, seed=1), step(group, OTHER, seed=2)
    want = a.run(), b.run()
    assert a.plan.decode.scratch is not b.plan.decode.scratch
    assert torch.equal(a.run(), want[0])
    assert torch.equal(b.run(), want[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 9}, {"logit_softcap": 3.0}, {"sinks": True}], ids=str)
def test_results_do_not_depend_on_the_rest_of_the_batch(dtype, fields, monkeypatch):
    """Bitwise, LSE included: every sequence alone gives what it gave among the others."""
    monkeypatch.setattr(steps, "PART_BYTES", 1 << 12)
    group = bind(spec(dtype=dtype, **fields), lse=True, deterministic=True, page_size=4)
    s = step(group, Lengths((1, 1, 1, 30, 6), (70, 3, 190, 30, 90)))
    whole, whole_lse = s.run(return_lse=True)
    given = {k: group.prepare_sinks(v) for k, v in s.extra.items()}
    token = 0
    for i, (n, m) in enumerate(zip(s.batch.query_lens.tolist(), s.batch.kv_lens.tolist())):
        rows = slice(token, token + n)
        alone = Batch([n], [m], block_table=s.batch.block_table[i : i + 1], slot_mapping=s.batch.slot_mapping[rows])
        got, lse = group.forward(s.q[rows], s.k[rows], s.v[rows], s.cache, group.plan(alone), return_lse=True, **given)
        assert torch.equal(got, whole[rows])
        assert torch.equal(lse, whole_lse[rows])
        token += n


@pytest.mark.parametrize("kind", MAKERS)
def test_out_is_filled_wherever_it_lies(kind):
    group = MAKERS[kind]()
    scales = (0.02, 0.02) if kind == "int8" else (1.0, 1.0)
    s = step(group, scales=scales)
    want = s.run()
    wide = torch.full((want.shape[0], want.shape[1] + 2, want.shape[2] + 8), 7.0)
    out = wide[:, 1:-1, 4:-4]
    assert s.run(out=out) is out
    assert torch.equal(out, want)
    wide[:, 1:-1, 4:-4] = 7.0
    assert bool((wide == 7.0).all())


def test_prefill_takes_new_keys_from_the_cache_where_none_are_given():
    """Layers that share another group's cache pass no k and v."""
    group = bind(spec(), lse=True, page_size=4)
    s = step(group)
    want = s.run()
    reader = group.plan(Batch(s.batch.query_lens, s.batch.kv_lens, block_table=s.batch.block_table))
    got = group.forward(s.q, None, None, s.cache, reader)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_encode_of_non_contiguous_inputs():
    s = encode_step(bind(spec(attn_type="encoder_only"), lse=True), Lengths((5, 600, 9), (5, 600, 9)))
    fused = torch.cat([s.q, s.k, s.v], 1)
    s.q, s.k, s.v = fused.split([6, 3, 3], 1)
    s.check()
