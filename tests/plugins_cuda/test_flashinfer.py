"""The flashinfer adapters (fa2 and fa3 wrappers, MLA, XQA) against their stand-in."""

from __future__ import annotations

import pytest
import torch

from attn_core.errors import NoBackendError
from attn_core.runtime import Capture
from attn_core.testing.compare import differences
from simulators import cuda_flashinfer
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
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

KERNELS = "attn_plugin_cuda.kernels"
A100, H100, RTX = (device("cuda", arch) for arch in ("sm_80", "sm_90", "sm_120"))
ENCODER = {"attn_type": "encoder_only"}
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool).expand(3, 3, 3)


def only_xqa(rows):
    mine, rules, dev = rows
    return tuple(r for r in mine if r.role != "decode" or r.bind == f"{KERNELS}.xqa:bind"), rules, dev


ROWS = rows_of("cuda", A100, "flashinfer")
GRID = [
    *(Case(name=f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}) for d in (128, 256)),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="own scale", spec={"scale": 0.3}),
    Case(name="softcap", spec={"logit_softcap": 2.0}),
    *(Case(name=f"window {w}", spec={"sliding_window": w}) for w in (1, 5, 33)),
    Case(name="192 and 128", spec={"head_dim": 192, "v_head_dim": 128}),
    Case(name="heads first", options={"kv_layout": "HND"}),
    *(Case(name=f"pages of {p}", options={"page_size": p}) for p in (1, 3, 128)),
    Case(name="deterministic", options={"deterministic": True}),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(
        name="tree", options={"verify_width": 3, "tree_mask": True}, lengths=VERIFY,
        batch={"decode_width": 3, "tree_mask": TREE},
    ),
    Case(
        name="tree in a window", spec={"sliding_window": 6}, options={"verify_width": 3, "tree_mask": True},
        lengths=VERIFY, batch={"decode_width": 3, "tree_mask": TREE},
    ),
    Case(name="no lse", lse=False),
    *(Case(name=t, options={"kv_cache_dtype": t}, scales=(0.5, 0.25), ulps=3) for t in ("fp8_e4m3", "fp8_e5m2")),
    Case(name="fp8 without scales", options=FP8),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec=ENCODER, lengths=RAGGED),
    Case(name="encoder padded", spec={**ENCODER, "head_dim": 32}, lengths=RAGGED),
    Case(name="encoder softcap", spec={**ENCODER, "logit_softcap": 2.0, "scale": 0.2}, lengths=RAGGED),
]  # fmt: skip
MLA = [
    Case(name="mla decode", spec={"kind": "mla"}, lengths=DECODE),
    Case(name="mla split", spec={"kind": "mla"}, lengths=DECODE, mla_query="split"),
    Case(name="mla scale", spec={"kind": "mla", "scale": 0.1}, lengths=DECODE),
    Case(name="mla no lse", spec={"kind": "mla"}, lengths=DECODE, lse=False),
    Case(
        name="mla verify", spec={"kind": "mla"}, lengths=VERIFY, batch={"decode_width": 3}, options={"verify_width": 3}
    ),
    Case(name="mla page 1", spec={"kind": "mla"}, lengths=DECODE, options={"page_size": 1}),
]
MLA_FP8 = Case(name="mla fp8", spec={"kind": "mla"}, lengths=DECODE, options=FP8, scales=(0.5, 1.0))
XQA = [
    *(
        Case(name=f"xqa {d}", spec={"head_dim": d}, lse=False, lengths=DECODE, options={"page_size": 16})
        for d in (64, 128)
    ),
    Case(
        name="xqa window",
        spec={"sliding_window": 7, "scale": 0.3},
        lse=False,
        lengths=DECODE,
        options={"page_size": 64},
    ),
    Case(name="xqa heads first", lse=False, lengths=DECODE, options={"kv_layout": "HND", "page_size": 32}),
    Case(name="xqa fp8", lse=False, lengths=DECODE, options={**FP8, "page_size": 16}, scales=(0.5, 0.25), ulps=3),
]


def make():
    return [cuda_flashinfer.stand_in()]


@pytest.mark.parametrize("case", [*GRID, *MLA], ids=lambda c: c.name)
def test_grid(case):
    check(ROWS, case, *make())


@pytest.mark.parametrize("case", [*MLA, MLA_FP8], ids=lambda c: c.name)
def test_mla_on_hopper(case):
    (stand_in,) = made = make()
    check(rows_of("cuda", H100, "flashinfer"), case, *made)
    assert {a.backend for a in stand_in.names("BatchMLAPagedAttentionWrapper")} == {"fa3"}


HOPPER = {
    "plain prefill": "fa3", "plain mixed": "fa3", "width 256": "fa3", "own scale": "fa3", "softcap": "fa3",
    "window 5": "fa3", "192 and 128": "fa3", "heads first": "fa3", "encoder": "fa3", "encoder softcap": "fa3",
    "cross": "fa3", "deterministic": "fa2", "fp8_e4m3": "fa2",
}  # fmt: skip
"""Case -> the kernel of its prefill or encode there."""


@pytest.mark.parametrize("name", HOPPER)
def test_prefill_on_hopper(name):
    (stand_in,) = made = make()
    group = check(rows_of("cuda", H100, "flashinfer"), next(c for c in GRID if c.name == name), *made)
    used = [a.backend for n, a in stand_in.calls if n.endswith("Wrapper")]
    assert HOPPER[name] in used
    assert {"decode", "encode"} & set(group.bindings)
    assert "auto" not in used


@pytest.mark.parametrize("case", XQA, ids=lambda c: c.name)
def test_xqa(case):
    group = check(only_xqa(rows_of("cuda", RTX, "flashinfer")), case, *make())
    assert group.bindings["decode"].page_size in (16, 32, 64)


def test_encoders_claim_no_window():
    """Plans count keys to the left only, and an encoder's window has two sides."""
    for dev in (A100, H100):
        with installed(*make()), pytest.raises(NoBackendError, match="sliding_window"):
            bound(rows_of("cuda", dev, "flashinfer"), Case(name="", spec={**ENCODER, "sliding_window": 6}))


def materialised(**spec):
    with installed(*make()):
        group = bound(ROWS, Case(name="materialised", spec={"kind": "mla", **spec}))
    long = Lengths((5, 3), (90, 40))
    return [*wrong_materialised(group, PREFILL, chunk_tokens=24), *wrong_materialised(group, long)]


@pytest.mark.parametrize("spec", [{}, {"scale": 0.1}], ids=str)
def test_materialised(spec):
    assert not materialised(**spec)


def everything(module):
    if module.endswith("xqa"):
        yield from attempts(only_xqa(rows_of("cuda", RTX, "flashinfer")), XQA, make)
    elif module.endswith("mla"):
        yield from attempts(ROWS, MLA, make)
        yield from attempts(rows_of("cuda", H100, "flashinfer"), [MLA_FP8], make)
    else:
        yield from attempts(ROWS, GRID, make)
        yield materialised
        yield captured_trees


MUTATIONS = [
    *mutations(f"{KERNELS}.flashinfer", {
        "scale dropped": ('"sm_scale": b.scale, ', ""),
        "causality dropped": ('"causal": b.spec.causal, ', ""),
        "window one too long": ('"window_left": left(b),\n', '"window_left": left(b) + 1,\n'),
        "softcap dropped": ('"logits_soft_cap": b.spec.logit_softcap, ', ""),
        "q's dtype left to the default": ('"q_data_type": b.dtype, ', ""),
        "lse in base 2": ("return (got[0], got[1] * LN2) if return_lse else got", "return got", 2),
        "lse in base 2 over ragged keys": ("lse = got[1] * LN2", "lse = got[1]"),
        "rows without keys left as they are": ("        step.nothing_seen(got[0], lse)\n", ""),
        "scales of the fp8 cache swapped": ("k_scale=kv_cache.k_scale, v_scale=kv_cache.v_scale", "k_scale=kv_cache.v_scale, v_scale=kv_cache.k_scale"),
        "v scale dropped": (", v_scale=kv_cache.v_scale, out", ", out"),
        "the backend left to flashinfer": ("backend=path", 'backend="auto"', 3),
        "layout left to the default": ("make(buffer, b.kv_layout, backend=path, **own)", "make(buffer, backend=path, **own)"),
        "offsets of keys for queries": ("batch.cu_query_lens, batch.cu_kv_lens,", "batch.cu_kv_lens, batch.cu_query_lens,"),
        "plain lengths for the last page": ("pages.last_page_len", "batch.kv_lens"),
        "offsets from the device": ("batch.cu_query_lens, pages.indptr", "batch.cu_query_lens, pages.indptr[:-1]"),
        "tree mask dropped": ("if step.masked or batch.tree_mask is not None:", "if False:"),
        "tree mask transposed": ("batch.tree_mask[row, query, new.clamp(min=0)]", "batch.tree_mask[row, new.clamp(min=0), query]"),
        "tree masks shifted by a row": ("keys[row] - width)", "keys[row] - width - 1)"),
        "window dropped before the tree": ("query - new <= window_left if window_left >= 0 else new < 0", "new < 0"),
        "window one short before the tree": ("query - new <= window_left", "query - new < window_left"),
        "masks forgotten in a captured plan": ("return Step(wrapper, masked=trees)", "return Step(wrapper, masked=False)"),
    }),
    *mutations(f"{KERNELS}.flashinfer_mla", {
        "mla scale dropped": ('"sm_scale": b.scale,', '"sm_scale": b.head_dim**-0.5,'),
        "mla not causal": ('"causal": True', '"causal": False'),
        "mla widths swapped": ('"head_dim_ckv": b.v_head_dim, "head_dim_kpe": b.head_dim - b.v_head_dim', '"head_dim_ckv": b.head_dim - b.v_head_dim, "head_dim_kpe": b.v_head_dim'),
        "mla lse in base 2": ('"lse_mode": "basee"', '"lse_mode": "base2"'),
        "mla base 2 asked for": ('"return_lse_base_on_e": lse', '"return_lse_base_on_e": False'),
        "mla q always packed": ('"query_layout": b.mla_query', '"query_layout": "packed"'),
        "mla page counts for lengths": ("pages.indices, batch.kv_lens)", "pages.indices, pages.last_page_len)"),
        "mla pair returned": ("return got if return_lse or not lse else got[0]", "return got", 2),
        "mla v scale for the latent": ("scale = kv_cache.k_scale", "scale = kv_cache.v_scale"),
    }),
    *mutations(f"{KERNELS}.xqa", {
        "xqa q as it comes": ("q.contiguous(), kv_cache.data", "q, kv_cache.data"),
        "xqa scale default": ("bmm1_scale=scale * kv_cache.k_scale, ", ""),
        "xqa k scale dropped": ("scale * kv_cache.k_scale", "scale"),
        "xqa v scale dropped": ("bmm2_scale=kv_cache.v_scale, ", ""),
        "xqa window dropped": ("window_left=window, ", ""),
        "xqa layout left to the default": ("sinks=sinks, kv_layout=layout,", "sinks=sinks,"),
        "xqa window of tokens": ("left(b), b.kv_layout", "b.sliding_window or -1, b.kv_layout"),
    }),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything(mutation.module))


FEW = ("plain mixed", "window 5", "width 128", "fp8_e4m3", "tree", "encoder")
IN_FLIGHT = [(ROWS, c) for c in [*GRID, MLA[0]] if c.name in (*FEW, "mla decode")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


def test_the_kernel_is_always_named():
    (stand_in,) = made = make()
    for case in (GRID[0], MLA[0], next(c for c in GRID if c.name == "encoder")):
        check(ROWS, case, *made)
    wrappers = [a for n, a in stand_in.calls if n.endswith("Wrapper")]
    assert len(wrappers) > 3
    assert {a.backend for a in wrappers} == {"fa2"}


def captured_trees():
    """A captured plan refilled by steps with a tree mask and without one."""
    options = {"graph": "decode", "page_size": 16, "verify_width": 3, "tree_mask": True}
    case = Case(name="captured", options=options, lengths=Lengths((3, 3, 3), (9, 3, 40)), batch={"decode_width": 3})
    with installed(*make()):
        group = bound(ROWS, case)
    found, plan = [], None
    for tree in (None, TREE, None):
        made = make_step(
            group, case if tree is None else Case(**{**vars(case), "batch": {**case.batch, "tree_mask": tree}})
        )
        capture = Capture(max_seqs=3, decode_width=3, max_kv_len=64)
        plan = group.plan(made.batch, capture=capture) if plan is None else group.plan(made.batch, out=plan)
        made.plan = plan
        out, lse = made.run(return_lse=True)
        want, want_lse = made.want()
        found += differences(out, want, out.dtype, lse=lse, want_lse=want_lse)
    return found


def test_captured_plans_take_steps_with_and_without_trees():
    assert not captured_trees()


def test_a_captured_plan_grows_by_padding_rows():
    with installed(*make()):
        group = bound(ROWS, Case(name="captured", options={"graph": "decode", "page_size": 16}))
    made = make_step(group, Case(name="", lengths=DECODE))
    plan = group.plan(made.batch, capture=Capture(max_seqs=6, decode_width=1, max_kv_len=200))
    buffers = plan.decode.wrapper.buffers
    before = buffers.paged_kv_indices_buf.data_ptr()
    group.plan(make_step(group, Case(name="", lengths=Lengths((1, 1), (100, 7))), 1).batch, out=plan)
    assert plan.decode.wrapper.indices.data_ptr() == before
