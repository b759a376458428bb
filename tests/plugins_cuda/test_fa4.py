"""The fa4 adapter against its stand-in."""

from __future__ import annotations

import pytest

from simulators import cuda_fa4
from simulators.harness import (
    CROSS,
    MANY,
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

ROWS = rows_of("cuda", device("cuda", "sm_100"), "fa4")
ENCODER = {"attn_type": "encoder_only"}

GRID = [
    *(Case(name=f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}) for d in (8, 72, 128, 256)),
    Case(name="192 and 128", spec={"head_dim": 192, "v_head_dim": 128}),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="own scale", spec={"scale": 0.3}),
    Case(name="softcap", spec={"logit_softcap": 2.0}),
    Case(name="sinks", spec={"sinks": True}),
    *(Case(name=f"window {w}", spec={"sliding_window": w}) for w in (1, 5, 33)),
    Case(name="all at once", spec={"sinks": True, "sliding_window": 7, "logit_softcap": 2.0, "scale": 0.2}),
    Case(name="bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(name="no lse", lse=False),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec=ENCODER, lengths=RAGGED),
    Case(name="encoder window", spec={**ENCODER, "sliding_window": 6}, lengths=RAGGED),
    Case(name="encoder softcap", spec={**ENCODER, "logit_softcap": 2.0, "scale": 0.2}, lengths=RAGGED),
]


def make():
    return [cuda_fa4.stand_in()]


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_grid(case):
    check(ROWS, case, *make())


MUTATIONS = mutations("attn_plugin_cuda.kernels.fa4", {
    "scale dropped": ("softmax_scale=scale, ", "", 2),
    "causality dropped": ("b.scale, b.spec.causal", "b.scale, False"),
    "encoders causal": ("causal=False", "causal=True"),
    "window dropped": ("window_size=window, ", "", 2),
    "one side open": ("window, softcap = both_sides(b)", "window, softcap = (both_sides(b)[0], -1)"),
    "sinks dropped": (" learnable_sink=sinks,", ""),
    "softcap dropped": ("            softcap=softcap, return_lse", "            return_lse"),
    "encoder's softcap dropped": ("window_size=window, softcap=softcap,\n", "window_size=window,\n"),
    "offsets for lengths": ("seqused_k=step.kv_lens", "cu_seqlens_k=step.kv_lens"),
    "lse heads first": ("(o, lse.T)", "(o, lse)", 2),
    "always a pair": ("(o, lse.T) if return_lse else o", "(o, lse)", 2),
    "longest swapped": ("max_seqlen_q=step.max_query, max_seqlen_k=step.max_kv,", "max_seqlen_q=step.max_kv, max_seqlen_k=step.max_query,"),
    "offsets swapped": ("cu_seqlens_q=step.cu_query, cu_seqlens_k=step.cu_kv", "cu_seqlens_q=step.cu_kv, cu_seqlens_k=step.cu_query * 2"),
})  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, attempts(ROWS, GRID, make))


IN_FLIGHT = [(ROWS, c) for c in GRID if c.name in ("plain mixed", "window 5", "sinks", "verify", "encoder")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)
