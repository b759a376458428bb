"""The trtllm_mha adapter against its stand-in."""

from __future__ import annotations

import pytest

from attn_core.errors import NoBackendError
from simulators import cuda_flashinfer
from simulators.harness import (
    MANY,
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
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

ROWS = rows_of("cuda", device("cuda", "sm_100"), "trtllm_mha")
ADAPTER = "attn_plugin_cuda.kernels.trtllm_mha"
FP8 = {"kv_cache_dtype": "fp8_e4m3"}


def case(name, spec=None, **fields):
    return Case(name=name, spec=spec or {}, lse=False, **fields)


GRID = [
    *(case(f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(case(f"width {d}", {"head_dim": d}) for d in (128, 256)),
    case("float16", {"dtype": "float16"}),
    case("own scale", {"scale": 0.3}),
    case("sinks", {"sinks": True}),
    *(case(f"window {w}", {"sliding_window": w}) for w in (1, 5, 33)),
    case("sinks in a window", {"sinks": True, "sliding_window": 7, "scale": 0.2}),
    *(case(f"pages of {p}", options={"page_size": p}) for p in (16, 32)),
    case("tokens first", options={"kv_layout": "NHD"}),
    case("bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    case("verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    case("fp8", options=FP8, scales=(0.5, 0.25), ulps=3),
]


def make():
    return [cuda_flashinfer.stand_in()]


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_grid(case):
    check(ROWS, case, *make())


SCRATCH = "attn_plugin_cuda.kernels.scratch"
MUTATIONS = [
    *mutations(ADAPTER, {
        "decode scale default": ("bmm1_scale=scale * kv_cache.k_scale, ", ""),
        "prefill without the k scale": ("            scale * kv_cache.k_scale, kv_cache.v_scale, step.rows", "            scale, kv_cache.v_scale, step.rows"),
        "v scale for k": ("bmm1_scale=scale * kv_cache.k_scale", "bmm1_scale=scale * kv_cache.v_scale"),
        "v scale dropped": ("bmm2_scale=kv_cache.v_scale, ", ""),
        "window dropped": ("window_left=window,", "", 2),
        "sinks dropped in decode": ("out=out, sinks=sinks,", "out=out,"),
        "sinks dropped in prefill": ("kv_layout=layout, sinks=sinks, causal", "kv_layout=layout, causal"),
        "layout left to the default": ("kv_layout=layout, ", "", 2),
        "verify width dropped": ("q_len_per_req=step.max_query, ", ""),
        "counters left to every call": (", multi_ctas_kv_counter_buffer=step.counters", "", 2),
        "the backend left to flashinfer": ("backend=PATH, q_len", "q_len"),
        "not causal": ("causal=True", "causal=False"),
        "lengths swapped with offsets": ("step.cu_query, step.cu_kv", "step.cu_kv, step.cu_query"),
        "longest swapped": ("step.max_query, step.max_kv,", "step.max_kv, step.max_query,"),
        "out ignored": ("out=out, ", "", 2),
    }),
    *mutations(SCRATCH, {
        "workspace not zeroed": ("workspace(device).zero_()", "workspace(device).fill_(1)"),
        "counters of the first step": ("step.rows * b.num_heads:", "0:"),
    }),
]  # fmt: skip


def growing():
    """A plan of two rows, refilled with many: the counters grow with it."""
    with installed(*make()):
        group = bound(ROWS, case("many heads", {"num_heads": 64, "num_kv_heads": 64}))
    small, large = (make_step(group, case("", lengths=Lengths((1,) * n, (5,) * n))) for n in (2, 9))
    large.plan = group.plan(large.batch, out=small.plan)
    large.run()
    return []


def test_counters_grow():
    assert growing() == []


def everything():
    yield from attempts(ROWS, GRID, make)
    yield growing


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())


IN_FLIGHT = [(ROWS, c) for c in GRID if c.name in ("plain mixed", "window 5", "sinks", "fp8", "verify")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


def test_fp8_under_float16_is_refused_when_resolving():
    with pytest.raises(NoBackendError, match="bfloat16"):
        bound(ROWS, case("fp8", {"dtype": "float16"}, options=FP8))
