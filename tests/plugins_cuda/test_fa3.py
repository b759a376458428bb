"""fa3 of three packages against their stand-ins: everything their rows claim, judged by the float64 reference."""

from __future__ import annotations

import pytest
import torch

from attn_core.errors import NoBackendError
from attn_core.runtime import Capture
from attn_core.testing.compare import differences
from simulators import cuda_fa3, cuda_vllm_flash
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
ADAPTER = "attn_plugin_cuda.kernels.flash"
FP8 = torch.float8_e4m3fn
STAND_INS = {"sgl": cuda_fa3.stand_in, "vllm": cuda_vllm_flash.stand_in, "upstream": cuda_fa3.upstream}
ROWS = {name: rows_of("cuda", H100, "fa3", bind=f"{ADAPTER}:bind_{name}_fa3") for name in STAND_INS}

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


LACKS = {
    "sgl": lambda c: False,
    "vllm": lambda c: "attention_chunk" in c.spec or c.options.get("page_size", 16) % 16,
    "upstream": lambda c: "sinks" in c.spec,
}
"""What a package's rows do not claim; the rest of the grid they do."""


def claimed(package):
    return [c for c in (*GRID, *MLA_DECODE) if not LACKS[package](c)]


def make(package):
    return lambda: [STAND_INS[package]()]


@pytest.mark.parametrize(
    ("package", "case"), [pytest.param(p, c, id=f"{p} {c.name}") for p in ROWS for c in claimed(p)]
)
def test_grid(package, case):
    check(ROWS[package], case, *make(package)())


REFUSED = {
    "upstream": [c for c in GRID if LACKS["upstream"](c)],
    "vllm": [
        *(c for c in GRID if LACKS["vllm"](c)),
        Case(name="sinks of many heads", spec={"sinks": True, "num_heads": 72, "num_kv_heads": 8}),
        Case(name="sinks and two widths", spec={"sinks": True, "head_dim": 192, "v_head_dim": 128}),
    ],
}


@pytest.mark.parametrize(
    ("package", "case"), [pytest.param(p, c, id=f"{p} {c.name}") for p, cases in REFUSED.items() for c in cases]
)
def test_what_a_package_lacks_is_refused(package, case):
    with pytest.raises(NoBackendError):
        bound(ROWS[package], case)


def test_kernel_driven_offload_is_refused_by_all():
    for rows in ROWS.values():
        with pytest.raises(NoBackendError, match="kv_offload_io"):
            bound(rows, Case(name="offload", options={"kv_offload_io": "kernel"}))


def materialised(package, **spec):
    with installed(*make(package)()):
        group = bound(ROWS[package], Case(name="materialised", spec={"kind": "mla", **spec}))
    return [*wrong_materialised(group, PREFILL, chunk_tokens=24), *wrong_materialised(group, LONG_CONTEXT)]


@pytest.mark.parametrize("package", ROWS)
@pytest.mark.parametrize("spec", [{}, {"scale": 0.1}], ids=str)
def test_materialised(package, spec):
    assert not materialised(package, **spec)


def everything(package):
    yield from attempts(ROWS[package], claimed(package), make(package))
    yield lambda: materialised(package)


MUTATIONS = [
    *(("sgl", m) for m in mutations(ADAPTER, {
        "scale left to the default": ('"softmax_scale": b.scale, ', ""),
        "scale of the padded width": ('"softmax_scale": b.scale', '"softmax_scale": b.head_dim**-0.5'),
        "causality forgotten": ('"causal": b.spec.causal', '"causal": False'),
        "encoders causal": ('"causal": b.spec.causal', '"causal": True'),
        "window dropped": ('"window_size": both_sides(b),', ""),
        "softcap dropped": ('"softcap": b.spec.logit_softcap or 0.0', '"softcap": 0.0'),
        "chunks dropped": ('given["attention_chunk"] = b.spec.attention_chunk', "pass"),
        "sinks dropped": ('{sinks_as: sinks, "out": out}', '{"out": out}', 3),
        "sinks in float32": ("sinks.to(torch.bfloat16)", "sinks.to(torch.float32)"),
        "cumulative lengths swapped": ('"cu_seqlens_q": step.cu_query, "cu_seqlens_k": step.cu_kv', '"cu_seqlens_q": step.cu_kv, "cu_seqlens_k": step.cu_query'),
        "longest swapped": ('"max_seqlen_k": step.max_kv,', '"max_seqlen_k": step.max_query,'),
        "lse as the kernel lays it out": ("(got[0], got[1].T)", "(got[0], got[1])", 4),
        "all that the kernel returns": ("(got[0], got[1].T) if return_lse else got", "got", 4),
        "metadata without the window": ('("causal", "window_size", "attention_chunk"', '("causal", "attention_chunk"'),
        "metadata without the chunk": ('"window_size", "attention_chunk", "num_splits")', '"window_size", "num_splits")'),
        "metadata of other splits": ('"attention_chunk", "num_splits")', '"attention_chunk")'),
        "metadata without the softcap": ('has_softcap=always["softcap"] > 0, ', ""),
        "metadata for the longest of the batch": ("step.max_kv if tells_longest else step.table.shape[1] * page_size", "step.max_kv"),
        "metadata in the other dtype": ("qkv_dtype=b.kv_dtype,", "qkv_dtype=b.dtype,"),
        "metadata of the first step": ("if self.capture is None or self.metadata is None:\n            self.metadata = made\n        else:", "if self.metadata is None:\n            self.metadata = made\n        elif self.capture:"),
        "fp8 descales swapped": ("k_descale=kv_cache.k_scale_t", "k_descale=kv_cache.v_scale_t"),
        "fp8 v descale dropped": ("            v_descale=kv_cache.v_scale_t.expand(step.rows, kv_heads),\n", ""),
        "q not rounded to fp8": ("q.clamp(-limit, limit).to(torch.float8_e4m3fn)", "q"),
        "latent and rotary part swapped": ("(rows[..., latent:], rows[..., :latent])", "(rows[..., :latent], rows[..., latent:])"),
        "q's parts swapped": ("q_latent, q_rope = q if split else q.split_with_sizes(widths, -1)", "q_rope, q_latent = q if split else q.split_with_sizes(widths, -1)"),
        "q's latent part dropped": ("{latent_as: q_latent}", "{}"),
        "out ignored": ('"out": out', '"out": None', 3),
        "out of latent calls ignored": ('given["out"] = sinks, out', 'given["out"] = sinks, None'),
        "another role's step": ("package.paged), attrgetter(b.role)", 'package.paged), attrgetter("decode")', 2),
        "order of additions left to the kernel": ('"num_splits": 1 if b.options.deterministic else 0', '"num_splits": 300 if b.options.deterministic else 0'),
    })),
    *(("vllm", m) for m in mutations(ADAPTER, {
        "vllm's lengths by sglang's name": ('"seqused_k", "block_table"', '"cache_seqlens", "block_table"'),
        "vllm's table by sglang's name": ('"seqused_k", "block_table"', '"seqused_k", "page_table"'),
        "vllm's latent by sglang's name": ('"q_v", "s_aux"', '"qv", "s_aux"'),
        "vllm's sinks by sglang's name": ('"q_v", "s_aux"', '"q_v", "sinks"'),
        "vllm's default version": ('        given["fa_version"] = package.version\n', "        pass\n"),
        "vllm's other version": ("vllm(VLLM_FA3, 3)", "vllm(VLLM_FA3, 2)"),
        "vllm not told the longest": ('            given["max_seqlen_k"] = longest\n', "            pass\n"),
        "vllm told the longest query": ("longest = step.max_kv if", "longest = step.max_query if"),
        "vllm's sinks in float32": ("prepare_sinks=None if package.version == 4", "prepare_sinks=None if package.version"),
        "chunks of 0 told to all": ("if b.spec.attention_chunk is not None:", "if True:"),
        "vllm's q not rounded to fp8": ("call=call_fp8 if b.kv_dtype == torch.float8_e4m3fn else call", "call=call"),
    })),
    *(("upstream", m) for m in mutations(ADAPTER, {
        "upstream told of out and sinks": (", takes_out=False", ""),
        "upstream's lse by sglang's name": ('ragged_lse="return_attn_probs", ', ""),
        "upstream's metadata for the longest of the batch": ("step.max_kv if tells_longest else step.table.shape[1] * page_size", "step.max_kv"),
    })),
    *(("vllm", m) for m in mutations("attn_core.adapters.windows", {
        "window one too long": ("return (b.sliding_window - 1, 0", "return (b.sliding_window, 0"),
        "window to the left only in encoders": ("else b.sliding_window - 1)", "else 0)"),
    })),
    *(("vllm", m) for m in mutations("attn_core.adapters.paged", {
        "cumulative for plain lengths": ("batch.kv_lens_device, table", "batch.cu_kv_lens_device[1:], table"),
        "bounds for lengths": ("batch.kv_lens_device, table", "batch.kv_lens, table"),
        "query lengths for key lengths": ("batch.kv_lens_device, table", "batch.query_lens_device, table"),
        "longest of the keys for queries": ("batch.max_query_len, batch.max_kv_len", "batch.max_kv_len, batch.max_query_len"),
    })),
    *(("vllm", m) for m in mutations("attn_core.adapters.ragged", {
        "longest keys of the queries": ("batch.max_query_len, batch.max_kv_len", "batch.max_query_len, batch.max_query_len"),
    })),
]  # fmt: skip


@pytest.mark.parametrize(("package", "mutation"), MUTATIONS, ids=lambda x: getattr(x, "what", ""))
def test_mutations_are_caught(package, mutation):
    assert caught(mutation, everything(package))


def in_flight(package):
    names = ("plain mixed", "window 5", "sinks", "width 128", "fp8", "verify", "encoder", "mla decode")
    return [(ROWS[package], c) for c in claimed(package) if c.name in names]


@pytest.mark.parametrize("package", ROWS)
def test_groups_and_batches_in_flight_do_not_meet(package):
    check_isolation(in_flight(package), make(package))


@pytest.mark.parametrize("package", ROWS)
def test_two_devices(package):
    check_two_devices(in_flight(package), make(package))


def all_packages():
    return [made() for made in STAND_INS.values()]


def test_packages_in_one_process_do_not_meet():
    """A group of each package, steps interleaved: what is kept on a cache or a plan belongs to one of them."""
    check_isolation([(rows, c) for rows in ROWS.values() for c in (GRID[0], MLA_DECODE[0])], all_packages)


@pytest.mark.parametrize("package", ROWS)
def test_a_captured_plan_keeps_its_addresses(package):
    """Refilled with other lengths and a wider table, every tensor that the graph read stays where it was."""
    with installed(*make(package)()):
        group = bound(ROWS[package], Case(name="captured", options={"graph": "full", "page_size": 16}))
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
