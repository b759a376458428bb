"""The fa2 adapter against its stand-in."""

from __future__ import annotations

import pytest

from simulators import cuda_fa2
from simulators.harness import (
    CROSS,
    MANY,
    MIXED,
    RAGGED,
    VERIFY,
    Case,
    attempts,
    caught,
    check,
    device,
    mutations,
    rows_of,
)
from simulators.isolation import check_isolation, check_two_devices

ROWS = rows_of("cuda", device("cuda", "sm_80"), "fa2")
ADAPTER = "attn_plugin_cuda.kernels.fa2"
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


def make():
    return [cuda_fa2.stand_in()]


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_grid(case):
    check(ROWS, case, *make())


MUTATIONS = mutations(ADAPTER, {
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


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, attempts(ROWS, GRID, make))


IN_FLIGHT = [(ROWS, c) for c in GRID if c.name in ("plain mixed", "window 5", "alibi", "verify", "encoder")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


def test_deterministic_decode_fixes_the_splits():
    (stand_in,) = made = make()
    check(ROWS, next(c for c in GRID if c.name == "deterministic"), *made)
    assert {a.num_splits for a in stand_in.names("flash_attn_with_kvcache")} == {1}
    assert MIXED.query[0] == 1
