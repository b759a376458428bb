"""AITER's adapters against their stand-in: everything the rows claim, judged by the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_core import BadInputError, NoBackendError
from simulators import rocm_aiter
from simulators.harness import (
    DECODE,
    MANY,
    MIXED,
    PREFILL,
    VERIFY,
    Case,
    Mutation,
    attempts,
    bound,
    caught,
    check,
    device,
    make_step,
    rows_of,
    wrong_materialised,
)
from simulators.standin import installed

GFX = {arch: device("rocm", arch) for arch in ("gfx942", "gfx950", "gfx1201", "gfx1250")}
MHA, UNIFIED, MLA = (f"attn_plugin_rocm.kernels.{name}" for name in ("mha", "unified", "mla"))
CK = rows_of("rocm", GFX["gfx942"], "aiter", unified=False, rank=0)
ONE = rows_of("rocm", GFX["gfx942"], "aiter", unified=True)
ALL = rows_of("rocm", GFX["gfx942"], "aiter")
FNUZ = {"kv_cache_dtype": "fp8_e4m3fnuz"}

PREFILLS = [
    *(Case(name=f"plain {name}", lengths=lengths, lse=name == "prefill") for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}, lse=False) for d in (64, 128, 256)),
    Case(name="float16", spec={"dtype": "float16"}, lse=False),
    Case(name="own scale", spec={"scale": 0.3}, lse=False),
    Case(name="softcap", spec={"logit_softcap": 2.0}, lse=False),
    Case(name="pages of 32", options={"page_size": 32}, lse=False),
    Case(name="one kv head", spec={"num_heads": 8, "num_kv_heads": 1}, lse=False),
]
UNIFIEDS = [
    *(Case(name=f"one kernel, plain {name}", lengths=lengths, lse=False) for name, lengths in MANY.items()),
    *(Case(name=f"one kernel, width {d}", spec={"head_dim": d}, lse=False) for d in (32, 72, 256)),
    *(Case(name=f"one kernel, window {w}", spec={"sliding_window": w}, lse=False) for w in (1, 5, 33)),
    Case(name="one kernel, sinks", spec={"sinks": True}, lse=False),
    Case(name="one kernel, softcap", spec={"logit_softcap": 2.0}, lse=False),
    Case(name="one kernel, alibi", spec={"alibi_slopes": (0.5, 0.25, 0.125, 0.06, 0.03, 0.01)}, lse=False),
    Case(name="one kernel, scale", spec={"scale": 0.3}, lse=False),
    Case(name="one kernel, all", spec={"sinks": True, "sliding_window": 7, "logit_softcap": 2.0}, lse=False),
    *(Case(name=f"one kernel, pages of {p}", options={"page_size": p}, lse=False) for p in (16, 64, 256)),
    Case(name="one kernel, fp8", options=FNUZ, scales=(0.5, 0.25), lse=False),
    Case(name="one kernel, bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5), lse=False),
    Case(name="one kernel, verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}, lse=False),
]
LATENT = {"kind": "mla", "num_heads": 16}
MLAS = [
    Case(name="mla", spec=LATENT, lengths=DECODE),
    Case(name="mla scale", spec={**LATENT, "scale": 0.1}, lengths=DECODE),
    Case(name="mla 32 heads", spec={**LATENT, "num_heads": 32}, lengths=DECODE),
    Case(name="mla no lse", spec=LATENT, lengths=DECODE, lse=False),
    Case(name="mla 4 heads, padded", spec={**LATENT, "num_heads": 4}, lengths=DECODE),
    Case(name="mla 12 heads, padded", spec={**LATENT, "num_heads": 12}, lengths=DECODE),
]
LATENT_ONLY = (tuple(r for r in ALL[0] if r.form == "absorbed"), *ALL[1:])
"""Without the materialised prefill, which goes first where it has the widths."""
EXTENDS = [
    Case(name="mla prefill", spec=LATENT, lengths=PREFILL, lse=False),
    Case(name="mla prefill and decode", spec=LATENT, lengths=MIXED, lse=False),
    Case(name="mla prefill scale", spec={**LATENT, "scale": 0.1}, lengths=PREFILL, lse=False),
    Case(name="mla prefill 4 heads, padded", spec={**LATENT, "num_heads": 4}, lengths=PREFILL, lse=False),
    Case(name="mla prefill 20 heads, padded to 128", spec={**LATENT, "num_heads": 20}, lengths=PREFILL, lse=False),
]
ELSEWHERE = [
    *(Case(name=f"plain {name}", lengths=lengths, lse=False) for name, lengths in MANY.items()),
    Case(name="narrow", spec={"head_dim": 32}, lse=False),
    Case(name="all", spec={"sinks": True, "sliding_window": 7, "logit_softcap": 2.0, "scale": 0.3}, lse=False),
    Case(name="bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5), lse=False),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}, lse=False),
]
"""Of the unified kernel on the archs where it stands behind Triton."""
WINDOWED = [
    Case(name="window and sinks beside another decode", spec={"sliding_window": 7, "sinks": True}, lengths=PREFILL,
         lse=False),
    Case(name="window, lse", spec={"sliding_window": 5}, lengths=PREFILL),
]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in PREFILLS if not c.lse], ids=lambda c: c.name)
def test_ck(case):
    check(CK, case, rocm_aiter.stand_in())


@pytest.mark.parametrize("case", UNIFIEDS, ids=lambda c: c.name)
def test_unified(case):
    check(ONE, case, rocm_aiter.stand_in())


@pytest.mark.parametrize("case", MLAS, ids=lambda c: c.name)
def test_mla(case):
    check(ALL, case, rocm_aiter.stand_in())


@pytest.mark.parametrize("case", EXTENDS, ids=lambda c: c.name)
def test_mla_prefill_on_the_latent_cache(case):
    made = rocm_aiter.stand_in()
    if case.spec["num_heads"] == 20:  # decode has no 20 heads, and the rule wants both or none
        rows = tuple(r for r in LATENT_ONLY[0] if r.role == "prefill")
        with installed(made), pytest.raises(NoBackendError, match="num_heads=20"):
            bound(LATENT_ONLY, case)
        case, rows = replace(case, lengths=PREFILL), (*rows, *latent_decode_of_core())
        check((rows, (), LATENT_ONLY[2]), case, made)
    else:
        check(LATENT_ONLY, case, made)
    assert made.last("mla_prefill_fwd").o.shape[1] == (128 if case.spec["num_heads"] > 16 else 16)


def latent_decode_of_core():
    from attn_core.backends import torch_native

    return (r for r in torch_native.backends(LATENT_ONLY[2]) if r.role == "decode")


def test_the_materialised_prefill_goes_first():
    with installed(rocm_aiter.stand_in()):
        assert bound(ALL, EXTENDS[0]).bindings["prefill"].form == "materialised"
        assert bound(LATENT_ONLY, EXTENDS[0]).bindings["prefill"].form == "absorbed"


def test_what_mla_prefill_does_not_state_is_refused():
    """A base for its LSE."""
    with installed(rocm_aiter.stand_in()), pytest.raises(NoBackendError, match="lse"):
        bound(LATENT_ONLY, replace(EXTENDS[0], lse=True))


@pytest.mark.parametrize("arch", ["gfx1201", "gfx1250"])
@pytest.mark.parametrize("case", ELSEWHERE, ids=lambda c: c.name)
def test_unified_elsewhere(arch, case):
    group = check(rows_of("rocm", GFX[arch], "aiter"), case, rocm_aiter.stand_in())
    assert group.page_size == (64 if arch == "gfx1250" else 32)


@pytest.mark.parametrize(
    ("spec", "options", "field"),
    [({"head_dim": 136}, {}, "head_dim"), ({}, {"page_size": 16}, "page_size"), ({}, {"page_size": 64}, "page_size"),
     ({"num_heads": 65, "num_kv_heads": 1}, {}, "group_size"), ({}, {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype")],
)  # fmt: skip
def test_what_exceeds_rdnas_local_memory_is_refused(spec, options, field):
    """Two stages of k and v in tiles of a page, and q: 64 KiB less what the compiler takes (aiter PR 5035)."""
    with pytest.raises(NoBackendError) as e:
        bound(rows_of("rocm", GFX["gfx1201"], "aiter"), Case(name="", spec=spec, options=options, lse=False))
    assert any(r.field == field and r.role == "decode" for r in e.value.rejections)
    assert 2 * 2 * 32 * 128 * 2 + 64 * 128 * 2 < 64 << 10


def test_the_unified_kernel_is_tritons_and_needs_it():
    for arch in ("gfx942", "gfx950", "gfx1201", "gfx1250"):
        for row in rows_of("rocm", GFX[arch], "aiter")[0]:
            assert row.unified is ("triton" in {r.name for r in row.requires}), (arch, row.role)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "gfx1151", "gfx1200"])
def test_nothing_of_aiter_where_sources_do_not_agree_on_it(arch):
    with pytest.raises(NoBackendError, match=r"device\.arch"):
        bound(rows_of("rocm", device("rocm", arch), "aiter"), Case(name="", lse=False))


def with_core_decode():
    """Batch prefill beside core's decode, which has what paged decode lacks."""
    from attn_core.backends import torch_native

    rows, rules, where = CK
    own = tuple(r for r in rows if r.role == "prefill" and r.form is None)
    return (*own, *(r for r in torch_native.backends(where) if r.role == "decode")), rules, where


@pytest.mark.parametrize("case", [*WINDOWED, *(c for c in PREFILLS if c.lse)], ids=lambda c: c.name)
def test_batch_prefill_with_windows_sinks_and_lse(case):
    check(with_core_decode(), case, rocm_aiter.stand_in())


def materialised(**spec):
    with installed(rocm_aiter.stand_in()):
        group = bound(ALL, Case(name="materialised", spec={**LATENT, **spec}))
    return wrong_materialised(group, PREFILL, chunk_tokens=24)


@pytest.mark.parametrize("spec", [{}, {"scale": 0.1}], ids=str)
def test_materialised(spec):
    assert not materialised(**spec)


def test_gfx950_reads_its_own_fp8():
    rows = rows_of("rocm", GFX["gfx950"], "aiter", unified=True)
    check(
        rows,
        Case(name="", options={"kv_cache_dtype": "fp8_e4m3"}, scales=(0.5, 0.25), lse=False),
        rocm_aiter.stand_in(),
    )


FP8_DECODE = Case(name="paged decode, fp8", options={**FNUZ, "page_size": 16}, scales=(0.5, 0.25), lse=False)


def paged_decode_beside_the_unified_prefill():
    rows, rules, where = ALL
    return tuple(r for r in rows if (r.role == "prefill") is r.unified), rules, where


def test_paged_decode_with_fp8():
    made = rocm_aiter.stand_in()
    check(paged_decode_beside_the_unified_prefill(), FP8_DECODE, made)
    assert made.last("paged_attention_v1").kv_cache_dtype == "fp8"


def test_scales_per_head_are_refused_by_the_kernel_that_reads_one():
    with installed(rocm_aiter.stand_in()):
        group = bound(ONE, Case(name="", options=FNUZ, lse=False))
    made = make_step(group, Case(name="", options=FNUZ, lse=False, scales=(torch.ones(3), torch.ones(3))))
    with pytest.raises(BadInputError, match="per head"):
        made.run()


def test_a_window_of_one_is_refused_by_the_kernel_that_takes_it_for_none():
    case = Case(name="", spec={"sliding_window": 1}, lse=False)
    with installed(rocm_aiter.stand_in()), pytest.raises(Exception, match="window of one token"):
        bound(with_core_decode(), case)


def everything():
    yield from attempts(CK, [c for c in PREFILLS if not c.lse], lambda: [rocm_aiter.stand_in()])
    for case in WINDOWED:
        yield from attempts(with_core_decode(), [case], lambda: [rocm_aiter.stand_in()])
    yield from attempts(ONE, UNIFIEDS, lambda: [rocm_aiter.stand_in()])
    yield from attempts(ALL, MLAS, lambda: [rocm_aiter.stand_in()])
    yield from attempts(LATENT_ONLY, EXTENDS[:4], lambda: [rocm_aiter.stand_in()])
    yield from attempts(paged_decode_beside_the_unified_prefill(), [FP8_DECODE], lambda: [rocm_aiter.stand_in()])
    yield lambda: materialised(scale=0.1)


MUTATIONS = [
    Mutation("prefill scale left to the default", MHA, "softmax_scale=scale, logits", "logits"),
    Mutation(
        "ragged scale left to the default", MHA, "softmax_scale=scale, causal=causal, return", "causal=causal, return"
    ),
    Mutation("prefill not causal", MHA, "logits_soft_cap=softcap, causal=causal,", "logits_soft_cap=softcap,"),
    Mutation("prefill softcap dropped", MHA, "logits_soft_cap=softcap, causal", "causal"),
    Mutation("window one too long", MHA, "both_sides(b)", "(b.sliding_window or -1, 0 if b.sliding_window else -1)"),
    Mutation(
        "sinks dropped",
        MHA,
        "kv_last_page_lens=step.last_page_lens, sink_ptr=sinks,",
        "kv_last_page_lens=step.last_page_lens,",
    ),
    Mutation("lse as the kernel lays it out", MHA, "(got[0], got[1].T)", "(got[0], got[1])"),
    Mutation("page lists swapped", MHA, "step.indptr, step.indices,", "step.indices, step.indptr,"),
    Mutation(
        "longest swapped",
        MHA,
        "step.max_query, step.max_kv,\n            softmax_scale=scale, logits",
        "step.max_kv, step.max_query,\n            softmax_scale=scale, logits",
    ),
    Mutation(
        "whole pages",
        MHA,
        "kv_last_page_lens=step.last_page_lens",
        "kv_last_page_lens=step.last_page_lens * 0 + page_size",
    ),
    Mutation("rows without keys as they come", MHA, "        step.nothing_seen(o, lse)\n", ""),
    Mutation("decode softcap dropped", MHA, '"NHD", softcap,', '"NHD", 0.0,'),
    Mutation("decode in the other layout", MHA, '"NHD"', '"HND"'),
    Mutation(
        "decode scales swapped",
        MHA,
        "kv_cache.k_scale_t, kv_cache.v_scale_t, None",
        "kv_cache.v_scale_t, kv_cache.k_scale_t, None",
    ),
    Mutation(
        "workspace without the sums", MHA, "b.v_head_dim * b.dtype.itemsize + 2 * 4", "b.v_head_dim * b.dtype.itemsize"
    ),
    Mutation("decode out not returned", MHA, "        return out\n", "        return None\n"),
    Mutation("decode q as it comes", MHA, "if q.stride(1) != width:", "if False:"),
    Mutation("decode lengths of the queries", MHA, "step.cu_query, step.kv_lens,", "step.cu_query, step.cu_query[1:],"),
    Mutation("unified scale of the width", UNIFIED, "= b.scale,", "= b.head_dim**-0.5,"),
    Mutation("unified window one too long", UNIFIED, "both_sides(b)", "(b.sliding_window or -1, 0)"),
    Mutation("unified softcap dropped", UNIFIED, "step.table, softcap, None", "step.table, 0.0, None"),
    Mutation("unified sinks dropped", UNIFIED, ", sinks=sinks,", ","),
    Mutation("unified slopes dropped", UNIFIED, "alibi_slopes=slopes, ", ""),
    Mutation("unified descales dropped", UNIFIED, "if quantised else (None, None)", "if False else (None, None)"),
    Mutation("unified descales swapped", UNIFIED, "None, k_descale, v_descale", "None, v_descale, k_descale"),
    Mutation("unified out ignored", UNIFIED, "        if out is None:\n", "        if True:\n"),
    Mutation("mla scratch for the output", MLA, "_, lse = attend(", "out, lse = attend("),
    Mutation("mla scale left to the default", MLA, "sm_scale=scale, ", ""),
    Mutation("mla lse always None", MLA, ", return_lse=return_lse,", ","),
    Mutation("mla lse transposed", MLA, "(out, lse)", "(out, lse.T)"),
    Mutation("mla q as it comes", MLA, "q.contiguous()", "q.transpose(0, 1).contiguous().transpose(0, 1)", 2),
    Mutation("mla prefill scale left to the default", MLA, "step.max_query, sm_scale=scale,\n", "step.max_query,\n"),
    Mutation(
        "mla prefill output left out",
        MLA,
        "            q.contiguous(), tokens(kv_cache), out, step.cu_query, step.indptr, step.indices, step.last",
        "            q.contiguous(), tokens(kv_cache), out.clone(), step.cu_query, step.indptr, step.indices, step.last",
    ),
    Mutation(
        "mla prefill keys of the queries",
        MLA,
        "out, step.cu_query, step.indptr, step.indices, step.last",
        "out, step.cu_query, step.cu_query, step.indices, step.last",
    ),
    Mutation(
        "mla prefill longest of the keys",
        MLA,
        "            step.max_query, sm_scale=scale,\n",
        "            step.max_query - 1, sm_scale=scale,\n",
    ),
    Mutation(
        "mla prefill output turned",
        MLA,
        "out = q.new_empty(q.shape[0], q.shape[1], latent)",
        "out = q.new_empty(q.shape[1], q.shape[0], latent).transpose(0, 1)",
        2,
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())
