"""MLA of ``intel_xpu`` on a stand-in of sgl-kernel-xpu."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attn_core import MissingKernelError, NoBackendError
from simulators import intel_xpu_mla
from simulators.contract import Misuse, Refused
from simulators.harness import (
    DECODE,
    PREFILL,
    Case,
    Lengths,
    attempts,
    bound,
    caught,
    check,
    device,
    mutations,
    rows_of,
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

ROWS = rows_of("intel", device("intel", "bmg"), "intel_xpu", form="absorbed")
LONG = Lengths((1, 1, 40, 3), (300, 129, 500, 20))


def case(name, lengths, *, heads=16, mla_query=None, lse=False, options=None, **spec):
    return Case(
        name=name, lengths=lengths, lse=lse, mla_query=mla_query, options=options or {},
        spec={"kind": "mla", "num_heads": heads, **spec},
    )  # fmt: skip


GRID = [
    case("decode", DECODE),
    case("decode far", Lengths((1, 1), (700, 3))),
    case("prefill", PREFILL),
    case("mixed", LONG),
    case("packed", LONG, mla_query="packed"),
    case("own scale", LONG, scale=0.3),
    case("float16", LONG, dtype="float16"),
    case("heads padded", LONG, heads=12),
    case("heads padded, packed", DECODE, heads=20, mla_query="packed"),
    *(case(f"pages of {p}", LONG, options={"page_size": p}) for p in (16, 32, 128)),
]


def make():
    return [intel_xpu_mla.stand_in()]


@pytest.mark.parametrize("c", GRID, ids=lambda c: c.name)
def test_grid(c):
    group = check(ROWS, c, *make())
    assert {b.form for r, b in group.bindings.items() if r != "kv_write"} == {"absorbed"}


def test_the_older_name_of_the_workspace_function(monkeypatch):
    stand_in = intel_xpu_mla.stand_in()
    monkeypatch.setitem(stand_in.contract.facts, "aliases", {})
    check(ROWS, GRID[0], stand_in)


@pytest.mark.parametrize(
    "fields",
    [{"lse": True}, {"sinks": True}, {"logit_softcap": 30.0}, {"heads": 256}, {"options": {"page_size": 1}},
     {"options": {"kv_cache_dtype": "fp8_e4m3"}}, {"options": {"verify_width": 2}}, {"options": {"graph": "decode"}}],
    ids=str,
)  # fmt: skip
def test_what_no_source_shows_is_refused(fields):
    with installed(*make()), pytest.raises(NoBackendError):
        bound(ROWS, case("", DECODE, **fields))


def test_the_package_is_named_when_it_is_missing():
    with pytest.raises(MissingKernelError, match="sglang-kernel-xpu"):
        bound(ROWS, GRID[0])


def given(pages=4, page=64, **changes):
    return SimpleNamespace(**{
        "q_nope": torch.randn(2, 16, 512).bfloat16(), "q_pe": torch.randn(2, 16, 64).bfloat16(),
        "kv_c_and_k_pe_cache": torch.randn(9, page, 576).bfloat16(), "sm_scale": 0.1, "num_kv_splits": -1,
        "seq_lens": torch.tensor([5, 90], dtype=torch.int32), "workspace": torch.empty(1 << 20, dtype=torch.uint8),
        "page_table": torch.arange(2 * pages, dtype=torch.int32).view(2, pages), **changes,
    })  # fmt: skip


def test_quirk_table_of_whole_tiles():
    with pytest.raises(Refused, match="whole tiles"):
        intel_xpu_mla.decode(given(pages=3))
    assert intel_xpu_mla.decode(given(pages=4)).shape == (2, 16, 512)


def test_quirk_workspace_for_the_table():
    small = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(Misuse, match="overflows"):
        intel_xpu_mla.decode(given(workspace=small))
    intel_xpu_mla.decode(given(workspace=small, num_kv_splits=1))


def test_quirk_no_lse():
    assert isinstance(intel_xpu_mla.decode(given()), torch.Tensor)


def test_quirk_prefill_pads_its_output():
    a = given(cu_seqlens_q=torch.tensor([0, 1, 2], dtype=torch.int32), max_seqlen_q=1, causal=True)
    a.seq_lens_k = a.seq_lens
    out = intel_xpu_mla.prefill(a)
    assert out.shape == (2, 16, 512)
    assert out.untyped_storage().nbytes() == 256 * 16 * 512 * 2


MUTATIONS = mutations("attn_plugin_intel.kernels.intel_xpu_mla", {
    "scale dropped to another": ("scale, heads = attrgetter(b.role), b.page_size or 1, b.scale,", "scale, heads = attrgetter(b.role), b.page_size or 1, 576**-0.5,"),
    "parts of q swapped": ("latent, rope = q if split else q.split_with_sizes(widths, -1)", "rope, latent = q if split else q.split_with_sizes(widths, -1)", 2),
    "widths swapped": ("(b.v_head_dim, b.head_dim - b.v_head_dim)", "(b.head_dim - b.v_head_dim, b.v_head_dim)"),
    "table not padded": ("if short := -step.table.shape[1] % pages_of_a_tile:", "if short := 0:"),
    "workspace for one split": ("heads, page_size, AUTO_SPLITS)", "heads, page_size, 1)"),
    "workspace for the keys": ("get_size(step.table.shape[1] * page_size,", "get_size(max(step.max_kv // 4, 1),"),
    "workspace never grown": ("if step.workspace.numel() < size:", "if False:"),
    "prefill not causal": ("causal=True", "causal=False"),
    "lengths of queries": ("step.cu_query, step.kv_lens, step.max_query", "step.cu_query, step.cu_query[1:], step.max_query"),
    "offsets of keys": ("step.cu_query, step.kv_lens, step.max_query", "step.kv_lens, step.kv_lens, step.max_query"),
    "longest of keys dropped": ("step.max_query, step.table", "1, step.table"),
})  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, attempts(ROWS, GRID, make))


IN_FLIGHT = [(ROWS, c) for c in GRID if c.name in ("decode", "mixed", "packed", "heads padded")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make, kind="xpu")
