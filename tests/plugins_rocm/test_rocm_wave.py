"""The adapters of SGLang's wave kernels against their stand-in: everything the rows claim, by the float64 reference."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from attn_core import BadInputError, NoBackendError
from attn_core.backends import torch_native
from attn_core.runtime import Capture, wrap_kv_cache
from simulators import rocm_wave
from simulators.harness import (
    DECODE,
    MANY,
    PREFILL,
    Case,
    Lengths,
    attempts,
    bound,
    caught,
    check,
    device,
    make_step,
    mutated,
    mutations,
    rows_of,
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

ROWS = rows_of("rocm", device("rocm", "gfx942"), "wave")
ADAPTER = "attn_plugin_rocm.kernels.wave"

FEW = Lengths((1, 1), (150, 3))
GRID = [
    *(Case(name=f"plain {name}", lengths=lengths, lse=False) for name, lengths in MANY.items()),
    Case(name="width 128", spec={"head_dim": 128}, lse=False),
    Case(name="float16", spec={"dtype": "float16"}, lse=False),
    Case(name="softcap", spec={"logit_softcap": 2.0}, lse=False),
    Case(name="a head each", spec={"num_heads": 3, "num_kv_heads": 3}, lse=False),
    Case(name="one kv head", spec={"num_heads": 8, "num_kv_heads": 1}, lse=False),
    Case(name="all are new", lengths=Lengths((5, 70), (5, 70)), lse=False),
]
OWN_SCALE = Case(name="own scale", spec={"scale": 0.3}, lse=False)


def make():
    return [rocm_wave.stand_in()]


def beside_core_decode():
    """Extend takes the scale that decode would drop."""
    rows, rules, where = ROWS
    core = [r for r in torch_native.backends(where) if r.role == "decode"]
    return (*(r for r in rows if r.role == "prefill"), *core), rules, where


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_wave(case):
    check(ROWS, case, *make())


def test_extend_has_a_scale_of_its_own():
    check(beside_core_decode(), OWN_SCALE, *make())


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"scale": 0.3}, "custom_scale"),
        ({"num_heads": 24, "num_kv_heads": 1}, "group_size"),
        ({"sliding_window": 5}, "sliding_window"),
        ({"sinks": True}, "sinks"),
    ],
)
def test_what_decode_would_drop_or_mix_up_is_refused(spec, field):
    with installed(*make()), pytest.raises(NoBackendError) as e:
        bound(ROWS, Case(name="", spec=spec, lse=False))
    assert ("decode", field) in {(r.role, r.field) for r in e.value.rejections}


def test_new_keys_are_read_from_the_cache():
    """A group that borrows another's cache is called without k and v."""
    case = Case(name="", lengths=PREFILL, lse=False)
    with installed(*make()):
        group = bound(ROWS, case)
    made = make_step(group, case)
    want = made.run()
    assert torch.equal(group.prefill(made.q, None, None, made.cache, made.plan), want)


def test_a_cache_with_gaps_is_refused_instead_of_copied():
    case = Case(name="", lengths=DECODE, lse=False)
    with installed(*make()):
        group = bound(ROWS, case)
    made = make_step(group, case)
    pages = torch.zeros(made.cache.num_pages, 1, 3, 130, dtype=torch.bfloat16)[..., :64]
    made.cache = wrap_kv_cache(pages, pages, layout="NHD", page_size=1)
    with pytest.raises(BadInputError, match="strides"):
        made.run()


@pytest.mark.parametrize(("pages", "fits"), [(2**31 // (3 * 64 * 2), True), (2**31 // (3 * 64 * 2) + 1, False)])
def test_a_cache_whose_end_would_be_read_as_zeros_is_refused(pages, fits):
    from attn_plugin_rocm.kernels.wave import tokens

    layer = (torch.empty(pages, 1, 3, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    cache = wrap_kv_cache(*layer, layout="NHD", page_size=1)
    with nullcontext() if fits else pytest.raises(BadInputError, match="bytes"):
        assert tokens(cache)[0].shape == (pages, 3, 64)


def test_a_captured_plan_keeps_its_addresses():
    with installed(*make()):
        group = bound(ROWS, Case(name="", lse=False))
    plan = group.plan(make_step(group, Case(name="", lengths=DECODE)).batch, capture=Capture(6, 1, 200))
    names = ("indptr", "indices", "parts", "maxima", "splits")
    addresses = [getattr(plan.decode, n).data_ptr() for n in names]
    other = make_step(group, Case(name="", lengths=FEW), seed=1)
    group.plan(other.batch, out=plan)
    assert addresses == [getattr(plan.decode, n).data_ptr() for n in names]


IN_FLIGHT = [(ROWS, c) for c in GRID if c.name in ("plain mixed", "width 128", "softcap", "all are new")]


def test_isolation():
    check_isolation(IN_FLIGHT, make)


@pytest.fixture
def current(monkeypatch):
    """Makes torch count the current device, which is 0 unless someone sets it, as on a machine with two."""
    now = [0]

    @contextmanager
    def entered(where):
        before, now[0] = now[0], torch.device(where).index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])


@pytest.mark.usefixtures("current")
def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


@pytest.mark.usefixtures("current")
def test_the_current_device_matters():
    stays = mutations(ADAPTER, {"stays": ("partial(torch.cuda.device, device)", "nullcontext")})
    with mutated(*stays), pytest.raises(RuntimeError, match="launched on device 0, the tensors are on cuda:1"):
        check_two_devices(IN_FLIGHT[:1], make)


MUTATIONS = mutations(ADAPTER, {
    "whole rows as the keys before": ("lens = batch.kv_lens_device - batch.query_lens_device", "lens = batch.kv_lens_device"),
    "new keys from the front": (", starts=lens)", ")"),
    "offsets of all keys": ("batch.cu_kv_lens_device - self.cu_query", "batch.cu_kv_lens_device"),
    "offsets exchanged": ("step.cu_query, step.cu_before,", "step.cu_before, step.cu_query,"),
    "64-bit indices": (", total, page_size).int()", ", total, page_size)"),
    "keys for values": ("values[step.new], keys, values", "values[step.new], keys, keys"),
    "new values are keys": ("keys[step.new], values[step.new]", "keys[step.new], keys[step.new]"),
    "extend scale left out": ("layer_scaling=scale, ", ""),
    "extend not causal": ("is_causal=True", "is_causal=False"),
    "extend softcap left out": (", logit_cap=softcap", ""),
    "decode softcap left out": ("                scale, softcap,\n", "                scale,\n"),
    "longest query of one": ("None, None, step.max_query", "None, None, 1"),
    "scratch of other heads": ("shapes(step.rows, width, heads, SPLITS)", "shapes(step.rows, heads, width, SPLITS)"),
    "scratch of the step before": ("if self.parts.shape != parts or", "if self.parts.numel() == 0 or"),
    "fewer splits than planned": ("step.splits, SPLITS,", "step.splits, SPLITS - 1,"),
    "pages for tokens": ("(k.flatten(0, 1), v.flatten(0, 1))", "(k, v)"),
    "output not returned": ("        return out\n\n    return Kernels(plan=plan, call=call)\n\n\nclass", "        return q\n\n    return Kernels(plan=plan, call=call)\n\n\nclass"),
    "q as it comes": ("        q = q.contiguous()\n", "", 2),
})  # fmt: skip


def strided_q():
    """q as a slice of a fused projection."""
    case = Case(name="", lengths=DECODE, lse=False)
    with installed(*make()):
        group = bound(ROWS, case)
    made = make_step(group, case)
    want = made.run()
    made.q = torch.cat((made.q, made.q), 1)[:, : made.q.shape[1]]
    return [] if torch.equal(made.run(), want) else ["differs"]


def fewer_rows():
    """What is wrong with a plan that served four rows before and serves two now."""
    with installed(*make()):
        group = bound(ROWS, Case(name="", lse=False))
    four, two = (make_step(group, Case(name="", lengths=lengths)) for lengths in (DECODE, FEW))
    want = two.run()
    two.plan = group.plan(two.batch, out=four.plan)
    return [] if torch.equal(two.run(), want) else ["differs"]


def test_a_plan_may_serve_fewer_rows_than_before():
    assert not fewer_rows()


def everything():
    yield from attempts(ROWS, GRID, make)
    yield fewer_rows
    yield from attempts(beside_core_decode(), [OWN_SCALE], make)
    yield strided_q


def test_q_may_be_a_slice():
    assert not strided_q()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())
