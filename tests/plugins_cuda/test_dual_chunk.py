"""Dual chunk attention over sgl-kernel's FlashAttention-3, around the edges of chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_core import AttentionSpec, BadInputError, NoBackendError, simulate
from attn_core.testing import reference
from simulators import cuda_fa3
from simulators.harness import (
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

ROWS = rows_of("cuda", device("cuda", "sm_90"), "dual_chunk_flash_attn")
CHUNK = 16
SMALL = {"page_size": 8}


def case(name, query, kv, *, chunk=CHUNK, options=SMALL, **more):
    spec = {"dual_chunk": chunk, **more.pop("spec", {})}
    return Case(name=name, spec=spec, lengths=Lengths(query, kv), options=options, ulps=3, **more)


GRID = [
    case("decode in the first chunk", (1, 1, 1), (1, 15, 16)),
    case("decode around the second", (1, 1, 1), (16, 17, 32)),
    case("decode far away", (1, 1, 1, 1), (33, 48, 49, 150)),
    case("decode of all kinds", (1, 1, 1, 1, 1), (3, 16, 17, 33, 65)),
    case("one key a page", (1, 1), (40, 7), options={"page_size": 1}),
    case("prefill within a chunk", (5, 16), (5, 16)),
    case("prefill over chunks", (17, 33, 50), (17, 33, 50)),
    case("pieces that end with a chunk", (16, 32, 8), (16, 48, 24)),
    case("extend", (5, 20, 3, 40), (30, 21, 19, 70)),
    case("mixed", (1, 1, 1, 20, 5), (9, 17, 60, 40, 5)),
    case("own scale", (1, 20), (40, 50), spec={"scale": 0.3}),
    case("float16", (1, 20), (40, 50), spec={"dtype": "float16"}),
    case("no lse", (1, 1, 18), (40, 3, 50), lse=False),
    case("deterministic", (1, 20), (40, 50), options={**SMALL, "deterministic": True}),
    case("width 128, chunks of a page", (1, 20), (40, 50), chunk=8, spec={"head_dim": 128}),
]


def make():
    return [cuda_fa3.stand_in()]


@pytest.mark.parametrize("c", GRID, ids=lambda c: c.name)
def test_grid(c):
    check(ROWS, c, *make())


def test_parts_that_nobody_has_are_not_called():
    (stand_in,) = made = make()
    for query, kv, calls in (((1, 1), (3, 16), 1), ((1, 1), (3, 17), 2), ((1, 1), (3, 33), 3), ((9,), (20,), 2)):
        with installed(*made):
            group = bound(ROWS, case("", query, kv))
        step = make_step(group, case("", query, kv))
        before = len(stand_in.calls)
        step.run()
        assert len(stand_in.calls) - before == calls


def test_it_is_plain_attention_where_the_three_queries_are_one():
    """The decomposition alone: with one query for all keys nothing but the order of sums differs."""
    c = case("", (1, 20, 3), (60, 40, 19))
    with installed(*make()):
        group = bound(ROWS, c)
    step = make_step(group, c)
    step.q = (step.q[0],) * 3
    got = step.run()
    plain = replace(group.spec, dual_chunk=None)
    want, _ = reference.attention(plain, step.batch, step.q[0], None, None, step.cache, scale=group.scale)
    assert torch.allclose(got.double(), want, rtol=2e-2, atol=2e-2)


def test_one_query_tensor_is_refused():
    with installed(*make()):
        group = bound(ROWS, GRID[0])
    step = make_step(group, GRID[0])
    for q in (step.q[0], step.q[:2], torch.cat(step.q, -1)):
        with pytest.raises(BadInputError, match="takes three q"):
            group.forward(q, step.k, step.v, step.cache, step.plan)


def decide(**options):
    spec = {"num_heads": 28, "num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16", "dual_chunk": 253952}
    return simulate("cuda:h100").resolve(AttentionSpec(**{**spec, **options.pop("spec", {})}), **options)


def test_only_its_own_backend_serves_it_and_nothing_else():
    decision = decide()
    (group,) = decision.groups.values()
    assert {group.choices[r].backend for r in ("prefill", "decode")} == {"dual_chunk_flash_attn"}
    assert {r.backend for r in decision.rejections if r.field == "dual_chunk"} >= {"fa3", "flashinfer", "triton"}
    with pytest.raises(NoBackendError, match="dual_chunk"):
        decide(spec={"dual_chunk": None}, backend="dual_chunk_flash_attn")
    for where in ("cuda:sm_80", "cuda:sm_100", "rocm:mi300x", "cpu:avx512"):
        with pytest.raises(NoBackendError, match="dual_chunk"):
            simulate(where).resolve(
                AttentionSpec(num_heads=28, num_kv_heads=4, head_dim=128, dtype="bfloat16", dual_chunk=253952)
            )


def test_chunks_begin_with_a_page():
    assert decide(page_size=512).values["page_size"] == 512
    with pytest.raises(NoBackendError, match="a chunk must begin where a page begins"):
        decide(page_size=1024, spec={"dual_chunk": 253952 + 512})
    assert decide(spec={"dual_chunk": 96}).values["page_size"] == 32
    assert decide(spec={"dual_chunk": 97}).values["page_size"] == 1


MUTATIONS = mutations("attn_plugin_cuda.kernels.dual_chunk", {
    "scale dropped": ("softmax_scale=scale, causal", "causal"),
    "all parts causal": ("causal=part.query == 0", "causal=True"),
    "no part causal": ("causal=part.query == 0", "causal=False"),
    "the own query everywhere": ("q[part.query], kv", "q[0], kv"),
    "queries of earlier parts swapped": ("parts.append(Part(1, before", "parts.append(Part(2, before"),
    "chunks counted from the end": ("numbers = (ends - 1).floor_divide_(chunk)", "numbers = ends.div(chunk, rounding_mode='floor').int()"),
    "pieces one query long": ("(at // chunk + 1) * chunk)", "(at // chunk + 1) * chunk + 1)"),
    "rows not cut": ("if step.max_query > 1:", "if False:"),
    "tables of rows for pieces": ("torch.tensor(rows)", "torch.zeros(len(rows), dtype=torch.int64)"),
    "own chunk read from the start": ("columns(table, first, -(-int", "columns(table, 0 * first, -(-int"),
    "the chunk before is the own": ("columns(table, first - pages, pages)", "columns(table, first, pages)"),
    "earlier chunks one too many": ("(numbers - 1).clamp_(min=0) * chunk", "numbers * chunk"),
    "earlier chunks forgotten": ("if last >= 2:", "if last >= 3:"),
    "the chunk before forgotten": ("if last >= 1:", "if last >= 2:"),
    "lse of the first part": ("o, lse = merge_state(o, lse, got[0], got[1].T, out=out if last else None)", "o = merge_state(o, lse, got[0], got[1].T, out=out if last else None)[0]"),
    "lse not turned": ("o, lse = got[0], got[1].T\n", "o, lse = got[0], got[1]\n"),
    "out filled by the first part": ("out=out if alone else None", "out=out"),
    "out forgotten in the merge": ("out=out if last else None", "out=None"),
    "lengths of rows for pieces": ("ends = cut(batch, chunk)", "_ = cut(batch, chunk)"),
})  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, attempts(ROWS, GRID, make))


IN_FLIGHT = [(ROWS, c) for c in GRID if c.name in ("decode of all kinds", "extend", "mixed", "own scale")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)
