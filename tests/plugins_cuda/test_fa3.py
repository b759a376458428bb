"""The fa3 adapter against its stand-in: everything its rows claim, judged by the float64 reference."""

from __future__ import annotations

import pytest
import torch

from attn_core.runtime import Capture
from attn_core.testing.compare import differences
from simulators import cuda_fa3
from simulators.harness import (
    CROSS,
    DECODE,
    MANY,
    PREFILL,
    RAGGED,
    VERIFY,
    Case,
    Lengths,
    attempts,
    bound,
    caught,
    check,
    device,
    make_step,
    mutations,
    rows_of,
    wrong_materialised,
)  # fmt: skip
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

H100 = device("cuda", "sm_90")
ROWS = rows_of("cuda", H100, "fa3")
ADAPTER = "attn_plugin_cuda.kernels.fa3"
FP8 = torch.float8_e4m3fn

LONG_CONTEXT = Lengths((5, 3), (90, 40))
GRID = [
    *(Case(name=f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}) for d in (8, 72, 128, 256)),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="own scale", spec={"scale": 0.3}),
    Case(name="softcap", spec={"logit_softcap": 2.0}),
    Case(name="sinks", spec={"sinks": True}),
    *(Case(name=f"window {w}", spec={"sliding_window": w}) for w in (1, 5, 33)),
    Case(name="chunk", spec={"attention_chunk": 8}),
    Case(name="all at once", spec={"sinks": True, "sliding_window": 7, "logit_softcap": 2.0, "scale": 0.2}),
    Case(name="192 and 128", spec={"head_dim": 192, "v_head_dim": 128}),
    Case(name="one kv head", spec={"num_heads": 8, "num_kv_heads": 1}),
    *(Case(name=f"pages of {p}", options={"page_size": p}) for p in (1, 3, 64, 256)),
    Case(name="deterministic", options={"deterministic": True}),
    Case(name="bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(name="no lse", lse=False),
    Case(name="fp8", options={"kv_cache_dtype": "fp8_e4m3"}, scales=(0.5, 0.25), q_dtype=FP8),
    Case(
        name="fp8 per head", options={"kv_cache_dtype": "fp8_e4m3"}, q_dtype=FP8,
        scales=(torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.25, 1.5, 0.5])),
    ),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec={"attn_type": "encoder_only"}, lengths=RAGGED),
    Case(name="encoder window", spec={"attn_type": "encoder_only", "sliding_window": 6}, lengths=RAGGED),
    Case(name="encoder softcap", spec={"attn_type": "encoder_only", "logit_softcap": 2.0}, lengths=RAGGED),
]  # fmt: skip
MLA_DECODE = [
    Case(name="mla decode", spec={"kind": "mla"}, lengths=DECODE),
    Case(name="mla split", spec={"kind": "mla"}, lengths=DECODE, mla_query="split"),
    Case(name="mla scale", spec={"kind": "mla", "scale": 0.1}, lengths=DECODE),
    Case(
        name="mla verify", spec={"kind": "mla"}, lengths=VERIFY, batch={"decode_width": 3},
        options={"verify_width": 3},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", [*GRID, *MLA_DECODE], ids=lambda c: c.name)
def test_grid(case):
    check(ROWS, case, cuda_fa3.stand_in())


def materialised(**spec):
    with installed(cuda_fa3.stand_in()):
        group = bound(ROWS, Case(name="materialised", spec={"kind": "mla", **spec}))
    return [*wrong_materialised(group, PREFILL, chunk_tokens=24), *wrong_materialised(group, LONG_CONTEXT)]


@pytest.mark.parametrize("spec", [{}, {"scale": 0.1}], ids=str)
def test_materialised(spec):
    assert not materialised(**spec)


def everything():
    yield from attempts(ROWS, [*GRID, *MLA_DECODE], lambda: [cuda_fa3.stand_in()])
    yield materialised


MUTATIONS = [
    *mutations(ADAPTER, {
        "scale left to the default": ("softmax_scale=scale, ", "", 4),
        "scale of the padded width": ("scale, causal, window, splits = b.scale,", "scale, causal, window, splits = b.head_dim**-0.5,"),
        "causality forgotten": ("scale, causal, window, splits = b.scale, b.spec.causal,", "scale, causal, window, splits = b.scale, False,"),
        "encoders causal": ("attrgetter(b.role), b.scale, b.spec.causal,", "attrgetter(b.role), b.scale, True,"),
        "softcap dropped": ("window_size=window, softcap=softcap, num_splits", "window_size=window, num_splits"),
        "softcap dropped over pages": ("attention_chunk=chunk, softcap=softcap,\n", "attention_chunk=chunk,\n", 2),
        "chunks dropped": ("b.spec.attention_chunk or 0", "0"),
        "sinks dropped": ("scheduler_metadata=step.metadata, num_splits=splits, return_softmax_lse=return_lse, sinks=sinks, ", "scheduler_metadata=step.metadata, num_splits=splits, return_softmax_lse=return_lse, ", 2),
        "sinks in float32": ("sinks.to(torch.bfloat16)", "sinks.to(torch.float32)"),
        "cumulative lengths swapped": ("step.cu_query, step.cu_kv, step.max_query", "step.cu_kv, step.cu_query, step.max_query"),
        "longest swapped": ("step.cu_kv, step.max_query, step.max_kv", "step.cu_kv, step.max_kv, step.max_query"),
        "lse as the kernel lays it out": ("(got[0], got[1].T)", "(got[0], got[1])", 4),
        "all that the kernel returns": ("(got[0], got[1].T) if return_lse else got", "got", 4),
        "metadata without the window": ("causal=causal, window_size=window, attention_chunk=chunk, has", "causal=causal, attention_chunk=chunk, has"),
        "metadata of other splits": ("has_softcap=softcap > 0,\n                    num_splits=splits,", "has_softcap=softcap > 0,"),
        "metadata in the other dtype": ("qkv_dtype=b.kv_dtype,", "qkv_dtype=b.dtype,"),
        "metadata of the first step": ("            step.schedule(", "            step.metadata is not None or step.schedule("),
        "fp8 descales swapped": ("k_descale=kv_cache.k_scale_t", "k_descale=kv_cache.v_scale_t"),
        "fp8 v descale dropped": ("            v_descale=kv_cache.v_scale_t.expand(step.rows, kv_heads),\n", ""),
        "q not rounded to fp8": ("q.clamp(-limit, limit).to(torch.float8_e4m3fn)", "q"),
        "latent and rotary part swapped": ("(rows[..., latent:], rows[..., :latent])", "(rows[..., :latent], rows[..., latent:])"),
        "q's latent part dropped": ("rope, latents, qv=q_latent,", "rope, latents,"),
        "out ignored": ("sinks=sinks, out=out,", "sinks=sinks,", 3),
        "another role's step": ("step_of, fp8 = attrgetter(b.role)", 'step_of, fp8 = attrgetter("decode")'),
    }),
    *mutations("attn_core.adapters.windows", {
        "window one too long": ("return (b.sliding_window - 1, 0", "return (b.sliding_window, 0"),
        "window to the left only in encoders": ("else b.sliding_window - 1)", "else 0)"),
    }),
    *mutations("attn_core.adapters.paged", {
        "cumulative for plain lengths": ("batch.kv_lens_device, table", "batch.cu_kv_lens_device[1:], table"),
        "bounds for lengths": ("batch.kv_lens_device, table", "batch.kv_lens, table"),
        "query lengths for key lengths": ("batch.kv_lens_device, table", "batch.query_lens_device, table"),
        "longest of the keys for queries": ("batch.max_query_len, batch.max_kv_len", "batch.max_kv_len, batch.max_query_len"),
    }),
    *mutations("attn_core.adapters.ragged", {
        "longest keys of the queries": ("batch.max_query_len, batch.max_kv_len", "batch.max_query_len, batch.max_query_len"),
    }),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())


IN_FLIGHT = [
    (ROWS, c) for c in GRID if c.name in ("plain mixed", "window 5", "sinks", "width 128", "fp8", "verify", "encoder")
]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation([*IN_FLIGHT, (ROWS, MLA_DECODE[0])], lambda: [cuda_fa3.stand_in()])


def test_two_devices():
    check_two_devices([*IN_FLIGHT, (ROWS, MLA_DECODE[0])], lambda: [cuda_fa3.stand_in()])


def test_a_captured_plan_keeps_its_addresses():
    """Refilled with other lengths and a wider table, every tensor that the graph read stays where it was."""
    with installed(cuda_fa3.stand_in()):
        group = bound(ROWS, Case(name="captured", options={"graph": "full", "page_size": 16}))
    small, large = (make_step(group, Case(name="", lengths=DECODE), seed) for seed in (0, 1))
    plan = group.plan(small.batch, capture=Capture(max_seqs=6, decode_width=1, max_kv_len=200))
    step = plan.decode
    tensors = {name: getattr(step, name) for name in ("cu_query", "kv_lens", "table", "metadata")}
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    wide = torch.cat((large.batch.block_table, torch.zeros(4, 9, dtype=torch.int32)), 1)
    group.plan(large.batch.with_pages(wide, large.batch.slot_mapping), out=plan)
    assert {name: getattr(plan.decode, name).data_ptr() for name in addresses} == addresses
    q = torch.cat((large.q, torch.zeros(2, *large.q.shape[1:], dtype=large.q.dtype)))
    k, v = (torch.cat((t, torch.zeros(2, *t.shape[1:], dtype=t.dtype))) for t in (large.k, large.v))
    out, lse = group.forward(q, k, v, large.cache, plan, return_lse=True)
    large.k, large.v = None, None
    want, want_lse = large.want()
    assert not differences(out[:4], want, out.dtype, lse=lse[:4], want_lse=want_lse)
