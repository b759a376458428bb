"""FlashInfer's kernels that apply sinks (fa2, fa3, XQA) against their stand-in."""

from __future__ import annotations

import pytest

from attn_core.errors import NoBackendError
from attn_core.runtime import Capture
from attn_core.testing.compare import differences
from simulators import cuda_flashinfer
from simulators.harness import (
    DECODE,
    MANY,
    PREFILL,
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

KERNELS = "attn_plugin_cuda.kernels"
A100, H100, RTX = (device("cuda", arch) for arch in ("sm_80", "sm_90", "sm_120"))


def case(name, spec=None, **fields):
    return Case(name=name, spec={"sinks": True, **(spec or {})}, lse=False, **fields)


ROWS, HOPPER = (rows_of("cuda", dev, "flashinfer_sinks") for dev in (A100, H100))
GRID = [
    *(case(f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    case("width 128", {"head_dim": 128}),
    case("float16", {"dtype": "float16"}),
    case("own scale", {"scale": 0.3}),
    *(case(f"window {w}", {"sliding_window": w}) for w in (1, 5, 33)),
    case("window and width 128", {"sliding_window": 5, "head_dim": 128}),
    case("heads first", options={"kv_layout": "HND"}),
    *(case(f"pages of {p}", options={"page_size": p}) for p in (1, 3, 128)),
    case("deterministic", options={"deterministic": True}),
    case("verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    case("alone", {"num_kv_heads": 6}),
]
XQA = [
    *(case(f"xqa {d}", {"head_dim": d}, lengths=DECODE, options={"page_size": 16}) for d in (64, 128)),
    case("xqa window", {"sliding_window": 7, "scale": 0.3}, lengths=DECODE, options={"page_size": 64}),
    case("xqa heads first", lengths=DECODE, options={"kv_layout": "HND", "page_size": 32}),
]


def make():
    return [cuda_flashinfer.stand_in()]


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_grid(case):
    (stand_in,) = made = make()
    check(ROWS, case, *made)
    assert {a.backend for a in stand_in.names("BatchPrefillWithPagedKVCacheWrapper")} == {"fa2"}


@pytest.mark.parametrize(
    "name", ["plain prefill", "plain mixed", "width 128", "window 5", "own scale", "deterministic"]
)
def test_prefill_on_hopper(name):
    (stand_in,) = made = make()
    check(HOPPER, next(c for c in GRID if c.name == name), *made)
    used = {a.backend for a in stand_in.names("BatchPrefillWithPagedKVCacheWrapper")}
    assert ("fa3" in used) is (name != "deterministic")


@pytest.mark.parametrize("case", XQA, ids=lambda c: c.name)
def test_xqa(case):
    (stand_in,) = made = make()
    check(rows_of("cuda", RTX, "flashinfer_sinks"), case, *made)
    assert all(a.sinks.shape == (6,) for a in stand_in.names("xqa_batch_decode_with_kv_cache"))


@pytest.mark.parametrize(("spec", "options"), [
    ({"sinks": False}, {}), ({"logit_softcap": 2.0}, {}), ({}, {"lse": True}), ({}, {"tree_mask": True}),
    ({}, {"kv_cache_dtype": "fp8_e4m3"}), ({"head_dim": 256}, {}), ({"attn_type": "cross"}, {}),
], ids=["no sinks", "softcap", "lse", "tree", "fp8", "width 256", "cross"])  # fmt: skip
def test_what_they_lack_is_refused(spec, options):
    for rows in (ROWS, HOPPER):
        with installed(*make()), pytest.raises(NoBackendError):
            bound(rows, case("", spec, options=options))


def names():
    """Every binary's name in one process, of all that these kernels can be bound for."""
    (stand_in,) = made = make()
    with installed(*made):
        for rows in (ROWS, HOPPER):
            for c in GRID:
                make_step(bound(rows, c), c)
    return {a.jit_args[0] for a in stand_in.names("BatchPrefillWithPagedKVCacheWrapper")}


def test_a_binarys_name_holds_all_it_depends_on():
    fa2 = {f"attn_core_sinks_fa2_bfloat16_{d}_{d}_{w}" for d in (64, 128) for w in ("full", "window")}
    found = names()
    assert {n for n in found if "fa2" in n} == {*fa2, "attn_core_sinks_fa2_float16_64_64_full"}
    assert {n.replace("fa2", "fa3") for n in fa2} <= found
    assert all(n.isidentifier() for n in found)


def captured():
    """A captured decode refilled with other steps."""
    c = case("", options={"graph": "decode", "page_size": 16}, lengths=DECODE)
    with installed(*make()):
        group = bound(ROWS, c)
    plan, found = None, []
    for lengths in (DECODE, Lengths((1, 1, 1, 1), (100, 7, 1, 33))):
        step = make_step(group, case("", lengths=lengths))
        capture = Capture(max_seqs=4, decode_width=1, max_kv_len=200)
        step.plan = plan = group.plan(step.batch, capture=capture) if plan is None else group.plan(step.batch, out=plan)
        out = step.run(return_lse=False)
        found += differences(out, step.want()[0], out.dtype)
    return found


def test_captured_decode():
    assert not captured()


WIDTHS = [
    (ROWS, case("64", lengths=PREFILL)), (ROWS, case("128", {"head_dim": 128}, lengths=PREFILL)),
    (ROWS, case("64 in a window", {"sliding_window": 5})), (HOPPER, case("64 on Hopper", lengths=PREFILL)),
    (HOPPER, case("128 on Hopper", {"head_dim": 128, "sliding_window": 7}, lengths=PREFILL)),
    (ROWS, case("float16", {"dtype": "float16"})), (rows_of("cuda", RTX, "flashinfer_sinks"), XQA[0]),
]  # fmt: skip


def test_two_widths_in_one_process_do_not_meet():
    check_isolation(WIDTHS, make)


def test_two_devices():
    check_two_devices(WIDTHS, make)


def everything(module):
    if module.endswith("xqa"):
        yield from attempts(rows_of("cuda", RTX, "flashinfer_sinks"), XQA, make)
    else:
        yield from attempts(ROWS, GRID, make)
        yield from attempts(HOPPER, GRID, make)
        yield captured


MUTATIONS = [
    *mutations(f"{KERNELS}.flashinfer_sinks", {
        "sinks dropped": ("kv_cache.data, sinks, scale, out=out)", "kv_cache.data, out=out)"),
        "sinks by the name that drops them": ("kv_cache.data, sinks, scale, out=out)", "kv_cache.data, out=out, sinks=sinks)"),
        "scale before sinks": ("sinks, scale, out=out", "scale, sinks, out=out"),
        "scale default": ("sinks, scale, out=out", "sinks, q.shape[-1] ** -0.5, out=out"),
        "the width left out of the name": ("_{b.head_dim}_{b.v_head_dim}_", "_"),
        "the dtype left out of the name": ("_{path}_{dtype}_", "_{path}_"),
        "the window left out of the name": ("_{'window' if in_window else 'full'}", ""),
        "the kernel left out of the name": ("attn_core_sinks_{path}_", "attn_core_sinks_"),
        "no window compiled in": ('"use_sliding_window": in_window', '"use_sliding_window": False'),
        "fa2's source for both": ('"attention_sink_decl")[path]', '"attention_sink_decl")["fa2"]'),
        "compiled for float16": ("name, b.dtype, b.dtype, b.dtype, torch.int32", "name, torch.float16, torch.float16, torch.float16, torch.int32"),
        "no sinks declared": ('["sink"], ["float"]', "[], []"),
        "out ignored": (", out=out)", ")"),
    }),
    *mutations(f"{KERNELS}.flashinfer", {
        "a wrapper without the variant": ("make(buffer, b.kv_layout, backend=path, **own)", "make(buffer, b.kv_layout, backend=path)"),
        "a captured wrapper without the variant": ("backend=path, **masks, **own,", "backend=path, **masks,"),
        "window of tokens": ('"window_left": left(b),\n', '"window_left": b.sliding_window or -1,\n'),
    }),
    *mutations(f"{KERNELS}.xqa", {
        "xqa without sinks": ("            sinks=sinks, kv_layout", "            kv_layout"),
        "xqa scale default": ("bmm1_scale=scale * kv_cache.k_scale, ", ""),
    }),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything(mutation.module))
