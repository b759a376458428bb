"""``intel_xpu`` on a stand-in of vllm-xpu-kernels: every row's claims against the float64 reference, every quirk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_core import BadInputError, MissingKernelError, NoBackendError, simulate
from attn_core.runtime import adapt
from numerics.kernel_cases import Lengths, gapped
from simulators.contract import Misuse
from simulators.harness import (
    DECODE,
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
    make_step,
    rows_of,
    wrong,
)
from simulators.intel_xpu import stand_in
from simulators.isolation import check_isolation
from simulators.standin import installed

ROWS = rows_of("intel", device("intel", "bmg"), "intel_xpu")
LONG = Lengths((1, 1, 5, 70, 4), (97, 1, 5, 130, 90))
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
GRID = [
    Case(name="plain"),
    Case(name="half", spec={"dtype": "float16"}),
    Case(name="without lse", lse=False, lengths=LONG),
    Case(name="decode", lengths=DECODE),
    Case(name="prefill", lengths=PREFILL),
    Case(name="scale", spec={"scale": 0.3}),
    Case(name="window", spec={"sliding_window": 20}, lengths=LONG),
    Case(name="window of one", spec={"sliding_window": 1}),
    Case(name="sinks", spec={"sinks": True}),
    Case(name="sinks in half", spec={"sinks": True, "dtype": "float16", "sliding_window": 9}, lengths=LONG),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(name="bounds", options={"host_lengths": "bounds"}, lengths=Lengths((1, 5), (30, 12)), bounds=(50, 12)),
    Case(name="fp8", options=FP8, scales=(0.5, 0.03)),
    Case(name="fp8 e5m2 window", spec={"sliding_window": 20}, options={"kv_cache_dtype": "fp8_e5m2"}, scales=(0.5, 2.0)),
    *(Case(name=f"width {w}", spec={"head_dim": w}) for w in (96, 128, 192)),
    Case(name="encode", spec={"attn_type": "encoder_only"}, lengths=RAGGED),
    Case(name="encode padded", spec={"attn_type": "encoder_only", "head_dim": 32}, lengths=RAGGED),
    Case(name="encode half", spec={"attn_type": "encoder_only", "dtype": "float16"}, lengths=RAGGED, lse=False),
]  # fmt: skip
ids = {"ids": lambda c: c.name}


@pytest.mark.parametrize("case", GRID, **ids)
def test_grid(case: Case) -> None:
    check(ROWS, case, stand_in())


@pytest.mark.parametrize("fields", [
    {"logit_softcap": 30.0}, {"alibi_slopes": (0.1,) * 6}, {"attn_type": "cross"}, {"head_dim": 80},
    {"dtype": "float32"}, {"attention_chunk": 64}, {"bias": True}, {"v_head_dim": 32},
    {"attn_type": "encoder_only", "sliding_window": 8}, {"attn_type": "encoder_only", "logit_softcap": 30.0},
], ids=str)  # fmt: skip
def test_what_is_not_promised_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(NoBackendError):
        bound(ROWS, Case(name="refused", spec=fields, lse=False))


def test_quirk_ignores_cap_and_slopes() -> None:
    """And so nobody is told that they are applied, and the adapter never passes them."""
    model = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16", "logit_softcap": 50.0}
    with pytest.raises(NoBackendError, match=r"does not support logit_softcap=50.0"):
        simulate("xpu:bmg").resolve(**model, backend="intel_xpu")
    with installed(stand_in()):
        from vllm_xpu_kernels.flash_attn_interface import flash_attn_varlen_func as real
    x, cu = torch.zeros(3, 2, 64).bfloat16(), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(Misuse, match="taken and ignored"):
        real(x, x, x, 3, cu, 3, cu_seqlens_k=cu, softcap=2.0)


def test_quirk_not_compiled_is_slow_not_refused() -> None:
    with pytest.raises(NoBackendError, match="head_dim=80 is not accepted"):
        bound(ROWS, Case(name="width", spec={"head_dim": 80}))


def test_quirk_paged_needs_out() -> None:
    vendor = stand_in()
    with installed(vendor):
        case = GRID[0]
        step = make_step(bound(ROWS, case), case)
    step.run()
    assert all(a.out is not None for a in vendor.names("flash_attn_varlen_func"))


def test_quirk_descales_of_one_number() -> None:
    case = next(c for c in GRID if c.name == "fp8")
    vendor = stand_in()
    with installed(vendor):
        step = make_step(bound(ROWS, case), case)
        step.run()
        given = vendor.last("flash_attn_varlen_func")
        assert given.k_descale.untyped_storage().nbytes() == 4
        first = given.k_descale
        step.run()
        assert vendor.last("flash_attn_varlen_func").k_descale is not None
        assert any(a.k_descale is first for a in vendor.names("flash_attn_varlen_func")[2:]), "made once, not per call"
        per_head = make_step(step.group, replace(case, scales=(torch.full((3,), 0.5), torch.full((3,), 0.5))))
        with pytest.raises(BadInputError, match="one scale for all heads"):
            per_head.run()


def test_quirk_lse_heads_first() -> None:
    case = GRID[0]
    with installed(stand_in()):
        step = make_step(bound(ROWS, case), case)
    _, lse = step.run(return_lse=True)
    assert lse.shape == step.q.shape[:2]


def test_kernels_that_do_not_load_are_a_reason() -> None:
    with installed(stand_in(available=False)), pytest.raises(MissingKernelError, match=r"libze_loader.so.1"):
        bound(ROWS, GRID[0])
    with pytest.raises(MissingKernelError, match="does not import"):
        bound(ROWS, GRID[0])


def test_outputs_and_tables_with_gaps() -> None:
    case = GRID[2]
    with installed(stand_in()):
        step = make_step(bound(ROWS, case), case)
    room = torch.zeros(step.q.shape[0], 2, *step.q.shape[1:], dtype=step.q.dtype)
    want = step.run()
    assert torch.equal(step.run(out=room[:, 0]), want)
    assert not room[:, 1].any()
    table = step.batch.block_table
    step.batch = step.batch.with_pages(torch.stack((table, table), -1)[..., 0], step.batch.slot_mapping)
    step.plan = step.group.plan(step.batch, out=step.plan)
    assert not wrong(step, case)


def test_batches_and_groups_in_flight() -> None:
    names = {"plain", "window", "sinks", "fp8", "verify", "encode"}
    check_isolation([(ROWS, c) for c in GRID if c.name in names], lambda: [stand_in()])


MODULE = "attn_plugin_intel.kernels.intel_xpu"
MUTATIONS = [
    Mutation("scale dropped", MODULE, "softmax_scale=scale, causal=True", "causal=True"),
    Mutation("scale dropped for encoders", MODULE, "softmax_scale=scale, causal=False", "causal=False"),
    Mutation("window one long", MODULE, "[b.sliding_window - 1, 0]", "[b.sliding_window, 0]"),
    Mutation("window dropped", MODULE, "window = None if b.sliding_window is None else [b.sliding_window - 1, 0]",
             "window = None"),
    Mutation("sinks dropped", MODULE, "s_aux=sinks", "s_aux=None"),
    Mutation("sinks in float32", MODULE, "_of_dtype(dtype) if b.spec.sinks else None", "None"),
    Mutation("not causal", MODULE, "causal=True", "causal=False"),
    Mutation("causal encoders", MODULE, "causal=False", "causal=True"),
    Mutation("scales dropped", MODULE, "if quantised else (None, None)", "if False else (None, None)"),
    Mutation("scale of v for k", MODULE, "cache.k_scale_t.expand(shape), cache.v_scale_t.expand(shape)",
             "cache.v_scale_t.expand(shape), cache.v_scale_t.expand(shape)"),
    Mutation("plan not refilled", MODULE,
             "out.max_queries, out.query_starts, out.max_keys, out.lens, out.table = longest, starts, max_keys, lens, table",
             "pass"),
    Mutation("out dropped", MODULE, "return_softmax_lse=return_lse, out=out, k_descale",
             "return_softmax_lse=return_lse, k_descale"),
    Mutation("lse not turned", MODULE, "got[1].t()", "got[1]", 2),
    Mutation("arguments in upstream's order", MODULE, "q, kv_cache.k, kv_cache.v, max_seqlen_q=step.max_queries, cu_seqlens_q=step.query_starts",
             "q, kv_cache.k, kv_cache.v, cu_seqlens_q=step.max_queries, max_seqlen_q=step.query_starts"),
    Mutation("k and v exchanged", MODULE, "q, kv_cache.k, kv_cache.v, max", "q, kv_cache.v, kv_cache.k, max"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mistakes_are_noticed(mutation: Mutation) -> None:
    assert caught(mutation, attempts(ROWS, GRID, lambda: [stand_in()]))


def test_gaps_taken_for_none_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the core's guard, which hands on an out with gaps to no kernel that does not claim it."""
    for case in GRID[:3]:
        with installed(stand_in()):
            assert not wrong(make_step(bound(ROWS, case), case), case)
    monkeypatch.setattr(adapt, "_with_packed_out", lambda call: call)
    for case in GRID[:3]:
        with installed(stand_in()):
            step = make_step(bound(ROWS, case), case)
        with pytest.raises(Misuse, match="gaps"):
            step.run(out=gapped(torch.zeros(step.q.shape, dtype=step.q.dtype)))
