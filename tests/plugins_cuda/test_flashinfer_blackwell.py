"""FlashInfer's CUTLASS and cuDNN kernels on Blackwell against their stand-ins: encoders, materialised MLA, pages."""

from __future__ import annotations

import pytest
import torch

from attn_core.errors import MissingKernelError, NoBackendError
from attn_core.runtime import Capture
from simulators import cuda_flashinfer
from simulators.harness import (
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
    wrong,
    wrong_materialised,
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

KERNELS = "attn_plugin_cuda.kernels"
B200, THOR = device("cuda", "sm_100"), device("cuda", "sm_110")
ENCODER = {"attn_type": "encoder_only", "num_heads": 6, "num_kv_heads": 6}
GROUPED = {"attn_type": "encoder_only", "num_heads": 6, "num_kv_heads": 3}
WIDE = {"head_dim": 128}
ALONE = {"head_dim": 128, "num_heads": 4, "num_kv_heads": 4}


def make():
    return [cuda_flashinfer.stand_in("sm_100")]


def rows(dev, *binds):
    """Rows with these adapters; of MLA and of roles that they do not serve, all."""
    mine, rules, _ = rows_of("cuda", dev, "flashinfer")
    return tuple(r for r in mine if r.bind in {f"{KERNELS}.{b}" for b in binds}), rules, dev


CUTLASS = rows(THOR, "flashinfer:bind_cutlass", "flashinfer_mla:bind")
CUDNN = rows(B200, "flashinfer:bind_cudnn", "flashinfer_mla:bind")
PAGED = rows(B200, "flashinfer_cudnn:bind")
ENCODERS = [
    Case(name="128", spec={**ENCODER, **WIDE}, lengths=RAGGED),
    Case(name="own scale", spec={**ENCODER, **WIDE, "scale": 0.3}, lengths=RAGGED),
    Case(name="float16", spec={**ENCODER, **WIDE, "dtype": "float16"}, lengths=RAGGED),
    Case(name="single tokens", spec={**ENCODER, **WIDE}, lengths=Lengths((1, 1, 1), (1, 1, 1))),
    Case(name="no lse", spec={**ENCODER, **WIDE}, lengths=RAGGED, lse=False),
]
CUTLASS_ENCODERS = [
    *ENCODERS,
    Case(name="64", spec={**ENCODER, "head_dim": 64}, lengths=RAGGED),
    Case(name="grouped", spec={**GROUPED, **WIDE}, lengths=RAGGED),
    Case(name="grouped single tokens", spec={**GROUPED, **WIDE}, lengths=Lengths((1, 1), (1, 1))),
]
CUDNN_ENCODERS = [*ENCODERS, Case(name="256", spec={**ENCODER, "head_dim": 256}, lengths=RAGGED)]
PAGES = [
    *(Case(name=f"plain {name}", spec=ALONE, lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"grouped {name}", spec=WIDE, lengths=lengths, lse=False) for name, lengths in MANY.items()),
    Case(
        name="single tokens", spec=ALONE, options={"verify_width": 3}, lengths=Lengths((3, 1, 1), (9, 1, 40)),
        batch={"decode_width": 3},
    ),
    Case(
        name="grouped single tokens", spec=WIDE, options={"verify_width": 3}, lengths=Lengths((3, 1), (9, 40)),
        batch={"decode_width": 3}, lse=False,
    ),
    Case(name="own scale", spec={**ALONE, "scale": 0.3}),
    Case(name="float16", spec={**ALONE, "dtype": "float16"}),
    Case(name="tokens first", spec=ALONE, options={"kv_layout": "NHD"}),
    *(Case(name=f"pages of {p}", spec=ALONE, options={"page_size": p}) for p in (32, 128, 512)),
    Case(name="bounds", spec=ALONE, options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    Case(
        name="verify", spec=ALONE, options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}
    ),
]  # fmt: skip
ONLY_DECODE = tuple(r for r in PAGED[0] if r.role == "decode"), *PAGED[1:]
DECODES = [
    Case(name="window", spec={**WIDE, "sliding_window": 7}, lengths=DECODE),
    Case(name="256", spec={"head_dim": 256}, lengths=DECODE),
    Case(
        name="verify in a window", spec={**WIDE, "sliding_window": 7}, options={"verify_width": 3}, lengths=VERIFY,
        batch={"decode_width": 3},
    ),
]  # fmt: skip
"""LSE of grouped heads, windows: what only cuDNN's decode has."""


def beside_fa2():
    """cuDNN's decode beside FlashInfer's fa2 for prefill."""
    mine, rules, dev = rows_of("cuda", B200, "flashinfer")
    prefill = tuple(r for r in mine if r.role == "prefill" and r.bind == f"{KERNELS}.flashinfer:bind")
    return (*ONLY_DECODE[0], *prefill), rules, dev


@pytest.mark.parametrize("case", CUTLASS_ENCODERS, ids=lambda c: c.name)
def test_cutlass_encoders(case):
    (stand_in,) = made = make()
    check(CUTLASS, case, *made)
    assert {a.backend for a in stand_in.names("BatchPrefillWithRaggedKVCacheWrapper")} == {"cutlass"}


@pytest.mark.parametrize("case", CUDNN_ENCODERS, ids=lambda c: c.name)
def test_cudnn_encoders(case):
    (stand_in,) = made = make()
    check(CUDNN, case, *made)
    assert {a.backend for a in stand_in.names("BatchPrefillWithRaggedKVCacheWrapper")} == {"cudnn"}


@pytest.mark.parametrize("case", PAGES, ids=lambda c: c.name)
def test_cudnn_over_pages(case):
    check(PAGED, case, *make())


@pytest.mark.parametrize("case", DECODES, ids=lambda c: c.name)
def test_cudnn_decode(case):
    check(beside_fa2(), case, *make())


def materialised(rows_, **spec):
    with installed(*make()):
        group = bound(rows_, Case(name="materialised", spec={"kind": "mla", **spec}))
    long = Lengths((5, 3), (90, 40))
    new = Lengths((2, 2), (2, 30))  # a row without cached context: no keys in the second pass
    return [
        *wrong_materialised(group, PREFILL, chunk_tokens=24), *wrong_materialised(group, long),
        *wrong_materialised(group, new),
    ]  # fmt: skip


@pytest.mark.parametrize("path", [CUTLASS, CUDNN], ids=["cutlass", "cudnn"])
@pytest.mark.parametrize("spec", [{}, {"scale": 0.1}], ids=str)
def test_materialised(path, spec):
    assert not materialised(path, **spec)


# What must not happen -------------------------------------------------------------------------------------------------


def crowded():
    """A step that CUTLASS's plan has no room for, between two that it has: fa2 serves it, by the same rows."""
    case = Case(name="", spec={"attn_type": "encoder_only", "num_heads": 65536, "num_kv_heads": 1, **WIDE}, lse=False)
    with installed(*make()):
        group = bound(CUTLASS, case)
    plan, found = None, []
    for queries in ((1, 1), (1, 1, 1), (2, 1)):
        step = make_step(group, Case(name="", spec=case.spec, lengths=Lengths(queries, queries)))
        step.plan = plan = group.plan(step.batch, out=plan)
        found.append(plan.encode.wrapper.backend)
    return [] if found == ["cutlass", "fa2", "cutlass"] else found


def test_a_step_without_room_goes_to_fa2():
    assert not crowded()
    assert dict(next(iter(CUTLASS[0])).variants) == {
        "cutlass": "up to 131072 tiles of 256 queries times heads",
        "fa2": "beyond",
    }


def test_lse_of_grouped_single_tokens_is_never_cudnns():
    for rows_, spec, lengths in ((CUDNN, {**GROUPED, **WIDE}, RAGGED), (PAGED, WIDE, PREFILL)):
        with pytest.raises(NoBackendError, match="group_size"), installed(*make()):
            bound(rows_, Case(name="", spec=spec, lengths=lengths))


LACKING = {
    "cutlass softcap": (CUTLASS, {**ENCODER, **WIDE, "logit_softcap": 2.0}),
    "cutlass window": (CUTLASS, {**ENCODER, **WIDE, "sliding_window": 5}),
    "cutlass 256": (CUTLASS, {**ENCODER, "head_dim": 256}),
    "cudnn softcap": (CUDNN, {**ENCODER, **WIDE, "logit_softcap": 2.0}),
    "cudnn window": (CUDNN, {**ENCODER, **WIDE, "sliding_window": 5}),
    "pages softcap": (PAGED, {**ALONE, "logit_softcap": 2.0}),
    "pages window": (PAGED, {**ALONE, "sliding_window": 5}),
    "pages sinks": (PAGED, {**ALONE, "sinks": True}),
    "pages 64": (PAGED, {**ALONE, "head_dim": 64}),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_these_kernels_lack_is_refused(what):
    rows_, spec = LACKING[what]
    with pytest.raises(NoBackendError), installed(*make()):
        bound(rows_, Case(name="", spec=spec, lse=False))


def declared():
    """Growing contexts of one batch declare one shape to cuDNN, so that it builds one graph."""
    (stand_in,) = made = make()
    with installed(*made):
        group = bound(PAGED, Case(name="", spec=ALONE, options={"page_size": 16}))
    plan = None
    for n in (40, 90, 1500):
        step = make_step(group, Case(name="", spec=ALONE, lengths=Lengths((1, 1, 17 + n // 8), (n, 1, n + 300))))
        step.plan = plan = group.plan(step.batch, out=plan)
        step.run(return_lse=True)
    shapes = {
        (a.max_sequence_kv, tuple(a.block_tables.shape), getattr(a, "max_token_per_sequence", 0))
        for _, a in stand_in.calls
    }
    want = {(2048, (2, 128), 0), (2048, (1, 128), 32), (2048, (1, 128), 256)}
    return list(shapes ^ want)


def test_consecutive_steps_share_cudnns_graphs():
    assert not declared()


def test_a_captured_decode_keeps_its_addresses():
    case = Case(name="", spec=ALONE, options={"graph": "decode", "page_size": 16})
    with installed(*make()):
        group = bound(PAGED, case)
    step = make_step(group, Case(name="", spec=ALONE, lengths=DECODE))
    plan = group.plan(step.batch, capture=Capture(max_seqs=4, decode_width=1, max_kv_len=200))
    before = plan.decode.table.data_ptr(), plan.decode.kv_lens.data_ptr(), tuple(plan.decode.table.shape)
    assert before[2] == (4, 128)
    other = make_step(group, Case(name="", spec=ALONE, lengths=Lengths((1, 1), (100, 7))), 1)
    group.plan(other.batch, out=plan)
    assert (plan.decode.table.data_ptr(), plan.decode.kv_lens.data_ptr(), tuple(plan.decode.table.shape)) == before


@pytest.mark.parametrize("rows_", [CUDNN, PAGED], ids=["ragged", "paged"])
def test_without_the_frontend_nothing_falls_back(rows_):
    stand_in = cuda_flashinfer.stand_in("sm_100")
    stand_in.values = {n: v for n, v in stand_in.values.items() if not n.startswith("cudnn.")}
    spec = ALONE if rows_ is PAGED else {**ENCODER, **WIDE}
    with installed(stand_in), pytest.raises(MissingKernelError, match="nvidia-cudnn-frontend"):
        bound(rows_, Case(name="", spec=spec))


# Mutations and isolation ----------------------------------------------------------------------------------------------


def everything(module):
    if module.endswith("cudnn"):
        yield from attempts(PAGED, PAGES, make)
        yield from attempts(beside_fa2(), DECODES, make)
        yield declared
    else:
        yield from attempts(CUTLASS, CUTLASS_ENCODERS, make)
        yield from attempts(CUDNN, CUDNN_ENCODERS, make)
        yield crowded
        yield lambda: materialised(CUTLASS)
        yield lambda: materialised(CUDNN)


MUTATIONS = [
    *mutations(f"{KERNELS}.flashinfer", {
        "cutlass plans beyond its room": ('"cutlass" if tiles * heads <= ROOM else "fa2"', '"cutlass"'),
        "tiles of other queries": ("sum(-(-n // TILE) for n", "sum(n // TILE for n"),
        "heads not counted": ("tiles * heads <= ROOM", "tiles <= ROOM"),
        "fa2 for every step": ('"cutlass" if tiles * heads <= ROOM else "fa2"', '"fa2"'),
        "the first wrapper for every step": ("if path not in step.wrappers:", "if not step.wrappers:"),
        "cutlass under cudnn's name": ('("cudnn",), lambda _: "cudnn"', '("cutlass",), lambda _: "cutlass"'),
        "base 2 over ragged keys": ("lse = got[1] * LN2", "lse = got[1]"),
        "causality dropped over ragged keys": ('"causal": b.spec.causal, ', ""),
        "rows over ragged keys as they come": ('packed = "cudnn" in paths', "packed = False"),
        "rows without keys as cudnn left them": ("        step.nothing_seen(got[0], lse)\n", ""),
        "keys for queries": ("wrapper.plan(batch.cu_query_lens, batch.cu_kv_lens,", "wrapper.plan(batch.cu_kv_lens, batch.cu_query_lens,"),
    }),
    *mutations(f"{KERNELS}.flashinfer_cudnn", {
        "prefill q as it comes": ("q.contiguous(), keys", "q, keys"),
        "decode lse in base 2": ("return (got[0], got[1] * LN2) if return_lse else got", "return got"),
        "decode window of tokens": ("scale, window, page_size = b.scale, left(b),", "scale, window, page_size = b.scale, b.sliding_window or -1,"),
        "decode window dropped": (", window_left=window,", ","),
        "verify width dropped": ("q_len_per_req=step.max_query, ", ""),
        "caches as they lie": ("kv_cache.k.transpose(1, 2), kv_cache.v.transpose(1, 2)", "kv_cache.k, kv_cache.v"),
        "values for keys": ("kv_cache.k.transpose(1, 2), kv_cache.v.transpose(1, 2)", "kv_cache.v.transpose(1, 2), kv_cache.k.transpose(1, 2)"),
        "lengths of one axis": ("step.kv_lens.view(-1, 1, 1, 1)", "step.kv_lens"),
        "offsets of elements": ('batch_offsets_units="tokens", ', ""),
        "lse padded": ("offsets if return_lse else None,", "None,"),
        "prefill lse in base 2": (', lse_base="ln"', ""),
        "prefill not causal": ("causal=True", "causal=False"),
        "longest query declared as one": ("max_token_per_sequence=_declared(step.max_query)", "max_token_per_sequence=1"),
        "every length a graph": ("table_multiple=max(1, KEYS // (b.page_size or 1))", "table_multiple=1"),
        "every query length a graph": ("return max(FEWEST, 1 << (longest - 1).bit_length())", "return longest"),
        "queries declared one short": ("(longest - 1).bit_length()", "(longest.bit_length() - 1)"),
        "walks beyond the table": ("max_sequence_kv=step.table.shape[1] * page_size,", "max_sequence_kv=step.table.shape[1] * page_size * 2,", 2),
        "prefill scale default": ("keys, values, scale, step.workspace,\n            max_token", "keys, values, q.shape[-1] ** -0.5, step.workspace,\n            max_token"),
        "decode scale default": ("keys, values, scale, step.workspace,\n            max_sequence", "keys, values, q.shape[-1] ** -0.5, step.workspace,\n            max_sequence"),
        "the pair returned": ("return got if return_lse else got[0]", "return got"),
    }),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything(mutation.module))


IN_FLIGHT = [
    (CUTLASS, CUTLASS_ENCODERS[0]), (CUTLASS, CUTLASS_ENCODERS[5]), (CUDNN, CUDNN_ENCODERS[0]),
    *((PAGED, c) for c in PAGES if c.name in ("plain mixed", "grouped mixed", "verify", "tokens first")),
    (beside_fa2(), DECODES[0]),
]  # fmt: skip


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


def test_outputs_that_are_not_contiguous_stay_with_the_core():
    """These kernels write by shape; the core copies."""
    for rows_, spec, lengths in ((CUTLASS, {**ENCODER, **WIDE}, RAGGED), (PAGED, ALONE, MANY["mixed"])):
        case = Case(name="", spec=spec, lengths=lengths, lse=False)
        with installed(*make()):
            step = make_step(bound(rows_, case), case)
        assert not wrong(step, case)
        tokens, heads, width = step.run(return_lse=False).shape
        out = torch.zeros(tokens, heads, 2 * width, dtype=torch.bfloat16)[..., :width]
        assert torch.equal(step.run(return_lse=False, out=out), step.run(return_lse=False))
