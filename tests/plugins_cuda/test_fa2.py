"""fa2 of two packages against their stand-ins."""

from __future__ import annotations

import pytest

from attn_core.errors import NoBackendError
from simulators import cuda_fa2, cuda_vllm_flash
from simulators.harness import (
    CROSS,
    MANY,
    MIXED,
    RAGGED,
    VERIFY,
    Case,
    attempts,
    bound,
    caught,
    check,
    device,
    mutations,
    rows_of,
)
from simulators.isolation import check_isolation, check_two_devices

KERNELS = "attn_plugin_cuda.kernels"
STAND_INS = {"fa2:bind": cuda_fa2.stand_in, "flash:bind_vllm_fa2": lambda: cuda_vllm_flash.stand_in(8)}
ROWS = {bind: rows_of("cuda", device("cuda", "sm_80"), "fa2", bind=f"{KERNELS}.{bind}") for bind in STAND_INS}
UPSTREAM, VLLM = STAND_INS
SLOPES = (0.5, 0.25, 0.125, 0.06, 0.03, 0.01)
ENCODER = {"attn_type": "encoder_only"}

GRID = [
    *(Case(name=f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}) for d in (8, 72, 256)),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="own scale", spec={"scale": 0.3}),
    Case(name="softcap", spec={"logit_softcap": 2.0}),
    *(Case(name=f"window {w}", spec={"sliding_window": w}) for w in (1, 5, 33)),
    Case(name="alibi", spec={"alibi_slopes": SLOPES}),
    Case(name="all at once", spec={"alibi_slopes": SLOPES, "sliding_window": 7, "logit_softcap": 2.0, "scale": 0.2}),
    Case(name="pages of 512", options={"page_size": 512}),
    Case(name="deterministic", options={"deterministic": True}),
    Case(name="bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(name="no lse", lse=False),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec=ENCODER, lengths=RAGGED),
    Case(name="encoder window", spec={**ENCODER, "sliding_window": 6}, lengths=RAGGED),
    Case(name="encoder alibi", spec={**ENCODER, "alibi_slopes": SLOPES}, lengths=RAGGED),
    Case(name="encoder softcap", spec={**ENCODER, "logit_softcap": 2.0, "scale": 0.2}, lengths=RAGGED),
]


OF_VLLM = [
    *GRID,
    *(Case(name=f"pages of {p}", options={"page_size": p}) for p in (16, 48)),
    Case(name="one kv head", spec={"num_heads": 8, "num_kv_heads": 1}, lengths=MANY["decode"]),
]
CASES = {UPSTREAM: GRID, VLLM: OF_VLLM}


def make(package):
    return lambda: [STAND_INS[package]()]


@pytest.mark.parametrize(("package", "case"), [pytest.param(p, c, id=f"{p} {c.name}") for p in ROWS for c in CASES[p]])
def test_grid(package, case):
    check(ROWS[package], case, *make(package)())


@pytest.mark.parametrize(("package", "page_size"), [(UPSTREAM, 16), (VLLM, 8), (VLLM, 1)])
def test_small_pages_are_refused(package, page_size):
    with pytest.raises(NoBackendError, match="page_size"):
        bound(ROWS[package], Case(name="", options={"page_size": page_size}))


@pytest.mark.parametrize("package", ROWS)
def test_sinks_and_8_bit_caches_are_refused(package):
    for case in (Case(name="", spec={"sinks": True}), Case(name="", options={"kv_cache_dtype": "fp8_e4m3"})):
        with pytest.raises(NoBackendError):
            bound(ROWS[package], case)


MUTATIONS = mutations(f"{KERNELS}.fa2", {
    "decode scale dropped": ("block_table=step.table, softmax_scale=scale, causal", "block_table=step.table, causal"),
    "prefill scale dropped": ("softmax_scale=scale, causal=causal, window_size=window, softcap=softcap, alibi_slopes=slopes,\n            return", "causal=causal, window_size=window, softcap=softcap, alibi_slopes=slopes,\n            return"),
    "causality dropped": ("b.spec.causal, both", "False, both", 2),
    "encoder causal": ("causal=False", "causal=True"),
    "window dropped": ("window_size=window, softcap", "softcap", 3),
    "softcap dropped": ("softcap=softcap, ", "", 3),
    "slopes dropped": ("alibi_slopes=slopes", "alibi_slopes=None", 3),
    "slopes in the model's dtype": ("dtype=torch.float32", "dtype=b.dtype"),
    "slopes in float64": ("dtype=torch.float32", "dtype=torch.float64"),
    "queries and rows swapped": ("(step.rows, step.max_query, heads", "(step.max_query, step.rows, heads"),
    "lse heads and queries mixed": ("got[1].transpose(1, 2).flatten(0, 1)", "got[1].flatten(0, 1)"),
    "lse not transposed": ("(got[0], got[1].T)", "(got[0], got[1])", 2),
    "three values returned": ("(got[0], got[1].T) if return_lse else got", "got", 2),
    "offsets swapped": ("step.cu_query, step.cu_kv,", "step.cu_kv, step.cu_query,", 2),
    "longest swapped": ("step.max_query, step.max_kv,", "step.max_kv, step.max_query,", 2),
    "the first step's table": ("        step.table = batch.block_table\n", "        step.table = batch.block_table if out is None else out.table\n"),
})  # fmt: skip


MUTATIONS_OF_VLLM = mutations(f"{KERNELS}.flash", {
    "vllm fa2 scale dropped": ('"softmax_scale": b.scale, ', ""),
    "vllm fa2 causality dropped": ('"causal": b.spec.causal', '"causal": False'),
    "vllm fa2 encoders causal": ('"causal": b.spec.causal', '"causal": True'),
    "vllm fa2 window dropped": ('"window_size": both_sides(b),', ""),
    "vllm fa2 softcap dropped": ('"softcap": b.spec.logit_softcap or 0.0', '"softcap": 0.0'),
    "vllm fa2 slopes dropped": ('given["alibi_slopes"] = torch.tensor', 'dropped = torch.tensor'),
    "vllm fa2 slopes in the model's dtype": ("b.alibi_slopes, dtype=torch.float32", "b.alibi_slopes, dtype=b.dtype"),
    "vllm fa2 slopes on the host": ("dtype=torch.float32, device=b.torch_device)", "dtype=torch.float64, device=b.torch_device)"),
    "vllm fa2 with metadata": ("schedules=version == 3", "schedules=True"),
    "vllm fa2 as fa3": ("vllm(VLLM_FA2, 2)", "vllm(VLLM_FA2, 3)"),
    "vllm fa2 lse heads first": ("(got[0], got[1].T)", "(got[0], got[1])", 4),
    "vllm fa2 another role's step": ("package.paged), attrgetter(b.role)", 'package.paged), attrgetter("decode")', 2),
    "vllm fa2 told the longest query": ("longest = step.max_kv if", "longest = step.max_query if"),
    "vllm fa2 in many splits": ('"num_splits": 1 if b.options.deterministic else 0', '"num_splits": 2 if b.options.deterministic else 0'),
    "vllm fa2 out ignored": ('"out": out', '"out": None', 3),
})  # fmt: skip
ALL_MUTATIONS = [*((UPSTREAM, m) for m in MUTATIONS), *((VLLM, m) for m in MUTATIONS_OF_VLLM)]


@pytest.mark.parametrize(("package", "mutation"), ALL_MUTATIONS, ids=lambda x: getattr(x, "what", ""))
def test_mutations_are_caught(package, mutation):
    assert caught(mutation, attempts(ROWS[package], CASES[package], make(package)))


def in_flight(package):
    names = ("plain mixed", "window 5", "alibi", "verify", "encoder")
    return [(ROWS[package], c) for c in GRID if c.name in names]


@pytest.mark.parametrize("package", ROWS)
def test_groups_and_batches_in_flight_do_not_meet(package):
    check_isolation(in_flight(package), make(package))


@pytest.mark.parametrize("package", ROWS)
def test_two_devices(package):
    check_two_devices(in_flight(package), make(package))


def test_packages_in_one_process_do_not_meet():
    check_isolation([*in_flight(UPSTREAM), *in_flight(VLLM)], lambda: [made() for made in STAND_INS.values()])


def test_deterministic_decode_fixes_the_splits():
    case = next(c for c in GRID if c.name == "deterministic")
    for package, function in ((UPSTREAM, "flash_attn_with_kvcache"), (VLLM, "flash_attn_varlen_func")):
        (stand_in,) = made = make(package)()
        check(ROWS[package], case, *made)
        assert {a.num_splits for a in stand_in.names(function)} == {1}
    assert MIXED.query[0] == 1
