"""MATE's adapters against their stand-in: everything the rows claim, judged by the float64 reference."""

from __future__ import annotations

import pytest

from simulators import musa_mate
from simulators.harness import (
    DECODE,
    MANY,
    PREFILL,
    RAGGED,
    VERIFY,
    Case,
    Mutation,
    attempts,
    bound,
    caught,
    check,
    device,
    rows_of,
    wrong_materialised,
)
from simulators.standin import installed

MP31 = device("musa", "mp31")
ROWS = {name: rows_of("musa", MP31, name) for name in ("fa3", "flashmla")}
FA3, FLASHMLA = (f"attn_plugin_musa.kernels.{name}" for name in ("fa3", "flashmla"))

GRID = [
    *(Case(name=f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}) for d in (128, 192, 256, 384, 512)),
    Case(name="192 and 128", spec={"head_dim": 192, "v_head_dim": 128}),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="own scale", spec={"scale": 0.3}),
    Case(name="softcap", spec={"logit_softcap": 2.0}),
    Case(name="sinks", spec={"sinks": True}, lse=False),
    *(Case(name=f"window {w}", spec={"sliding_window": w}) for w in (1, 5, 33)),
    Case(
        name="all at once", spec={"sinks": True, "sliding_window": 7, "logit_softcap": 2.0, "scale": 0.2}, lse=False
    ),
    Case(name="one kv head", spec={"num_heads": 8, "num_kv_heads": 1}),
    *(Case(name=f"pages of {p}", options={"page_size": p}) for p in (1, 16, 256)),
    Case(name="bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(name="no lse", lse=False),
    *(Case(name=f"encoder {d}", spec={"attn_type": "encoder_only", "head_dim": d}, lengths=RAGGED)
      for d in (32, 64, 192)),
    Case(name="encoder softcap", spec={"attn_type": "encoder_only", "logit_softcap": 2.0}, lengths=RAGGED),
]  # fmt: skip
MLA = [
    Case(name="mla decode", spec={"kind": "mla"}, lengths=DECODE),
    Case(name="mla scale", spec={"kind": "mla", "scale": 0.1}, lengths=DECODE),
    Case(name="mla no lse", spec={"kind": "mla"}, lengths=DECODE, lse=False),
    Case(
        name="mla verify", spec={"kind": "mla"}, lengths=VERIFY, batch={"decode_width": 3},
        options={"verify_width": 3},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", [*GRID, *MLA], ids=lambda c: c.name)
def test_fa3(case):
    check(ROWS["fa3"], case, musa_mate.stand_in())


@pytest.mark.parametrize("case", MLA, ids=lambda c: c.name)
def test_flashmla(case):
    check(ROWS["flashmla"], case, musa_mate.stand_in())


def materialised(backend="fa3", **spec):
    with installed(musa_mate.stand_in()):
        group = bound(ROWS[backend], Case(name="materialised", spec={"kind": "mla", **spec}))
    return wrong_materialised(group, PREFILL, chunk_tokens=24)


@pytest.mark.parametrize("backend", ROWS)
@pytest.mark.parametrize("spec", [{}, {"scale": 0.1}], ids=str)
def test_materialised(backend, spec):
    assert not materialised(backend, **spec)


@pytest.mark.parametrize(
    ("spec", "family"),
    [({"head_dim": 64}, "mubin"), ({"head_dim": 128}, "mubin"), ({"head_dim": 192}, "mutlass"),
     ({"head_dim": 64, "logit_softcap": 2.0}, "mutlass")],
)  # fmt: skip
def test_the_kernel_family_of_ragged_calls_is_named(spec, family):
    made = musa_mate.stand_in()
    check(ROWS["fa3"], Case(name="", spec={"attn_type": "encoder_only", **spec}, lengths=RAGGED), made)
    assert made.last("flash_attn_varlen_func").backend == family


def test_one_plan_of_the_latent_kernel_serves_all_layers_of_a_step_and_no_other():
    from simulators.harness import make_step

    made = musa_mate.stand_in()
    case = MLA[0]
    with installed(made):
        group = bound(ROWS["fa3"], case)
    first = make_step(group, case)
    for _ in range(3):  # three layers
        first.run()
    planned = [a.scheduler_metadata[1] for a in made.names("flash_attn_with_kvcache")]
    assert planned == [False, True, True]
    group.plan(first.batch, out=first.plan)
    first.run()
    assert made.last("flash_attn_with_kvcache").scheduler_metadata[1] is False


def test_keys_that_are_new_are_never_told_to_the_scheduler():
    made = musa_mate.stand_in()
    check(ROWS["fa3"], Case(name="", lengths=DECODE), made)
    for name in ("get_scheduler_metadata", "flash_attn_with_kvcache"):
        assert made.last(name).cu_seqlens_k_new is None


def everything():
    yield from attempts(ROWS["fa3"], [*GRID, *MLA], lambda: [musa_mate.stand_in()])
    yield from attempts(ROWS["flashmla"], MLA, lambda: [musa_mate.stand_in()])
    yield materialised


MUTATIONS = [
    Mutation("scale left to the default", FA3, "softmax_scale=scale, ", "", 3),
    Mutation("causality forgotten", FA3, "window, softcap = b.scale, b.spec.causal,", "window, softcap = b.scale, False,"),
    Mutation("causality as a window", FA3, "softmax_scale=scale, causal=causal, softcap=softcap,", "softmax_scale=scale, window_size=(-1, 0) if causal else (-1, -1), softcap=softcap,"),
    Mutation("encoders causal", FA3, "attrgetter(b.role), b.scale, b.spec.causal\n", "attrgetter(b.role), b.scale, True\n"),
    Mutation("window one too long", FA3, "both_sides(b)", "(b.sliding_window or -1, 0 if b.sliding_window else -1)"),
    Mutation("softcap dropped", FA3, "causal=causal, softcap=softcap, return", "causal=causal, return"),
    Mutation("softcap dropped when paged", FA3, "learnable_sink=sinks, softcap=softcap,", "learnable_sink=sinks,"),
    Mutation("sinks dropped", FA3, "learnable_sink=sinks, ", ""),
    Mutation("sinks in float32", FA3, "sinks.to(torch.bfloat16)", "sinks.to(torch.float32)"),
    Mutation("lse as the kernel lays it out", FA3, "(got[0], got[1].T)", "(got[0], got[1])", 2),
    Mutation("lse of ragged calls likewise", FA3, "got[0], got[1].T\n", "got[0], got[1]\n"),
    Mutation("all that the kernel returns", FA3, "(got[0], got[1].T) if return_lse else got", "got", 2),
    Mutation("rows without keys as they come", FA3, "        step.nothing_seen(o, lse)\n", ""),
    Mutation("kernel family left open", FA3, "return_softmax_lse=return_lse, backend=backend,", "return_softmax_lse=return_lse,"),
    Mutation("wrong kernel family", FA3, 'return "mubin" if assembled and b.spec.logit_softcap is None', 'return "mubin" if assembled'),
    Mutation("new keys told to the scheduler", FA3, "cu_seqlens_q=step.cu_query,\n                    page_size", "cu_seqlens_k_new=step.cu_query,\n                    page_size"),
    Mutation("metadata without the window", FA3, "causal=causal, window_size=window, has", "causal=causal, has"),
    Mutation("metadata of the step before", FA3, "            step.schedule(made)\n", "            step.metadata = step.metadata if step.metadata is not None else made * 0\n"),
    Mutation("latent and rotary part swapped", FA3, "(rows[..., latent:], rows[..., :latent])", "(rows[..., :latent], rows[..., latent:])"),
    Mutation("q's latent part dropped", FA3, "rope, latents, qv=q_latent,", "rope, latents,"),
    Mutation("no workspace", FA3, "scheduler_metadata=step.metadata(), ", ""),
    Mutation("workspace believed", FA3, "self.planned = False\n\n    def", "self.planned = True\n\n    def"),
    Mutation("a small workspace", FA3, "128 << 20", "128 << 10"),
    Mutation("flashmla scale", FLASHMLA, "softmax_scale=scale, ", ""),
    Mutation("flashmla not causal", FLASHMLA, "causal=True", "causal=False"),
    Mutation("flashmla lse transposed", FLASHMLA, "lse.flatten(0, 1))", "lse.transpose(1, 2).flatten(0, 1))"),
    Mutation("flashmla heads of one query", FLASHMLA, "step.max_query * heads, 1, heads", "heads, 1, heads"),
    Mutation("flashmla tuple returned", FLASHMLA, "if return_lse else o.flatten(0, 1)", ""),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())
