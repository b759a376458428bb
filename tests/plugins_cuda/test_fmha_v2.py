"""FlashInfer's fmha_v2 for encoders on Hopper and SM12x against its stand-in."""

from __future__ import annotations

import pytest
import torch

from attn_core.errors import NoBackendError
from simulators import cuda_flashinfer
from simulators.harness import (
    RAGGED,
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

ADAPTER = "attn_plugin_cuda.kernels.fmha_v2"
HOPPER, GEFORCE = device("cuda", "sm_90"), device("cuda", "sm_120")


def mine(dev):
    rows, rules, _ = rows_of("cuda", dev, "flashinfer")
    return tuple(r for r in rows if r.bind == f"{ADAPTER}:bind"), rules, dev


def case(name, *, lengths=RAGGED, options=None, **spec):
    spec = {"attn_type": "encoder_only", **spec}
    return Case(name=name, spec=spec, lengths=lengths, lse=False, options=options or {})


GRID = [
    case("64"), case("128", head_dim=128), case("256", head_dim=256), case("own scale", scale=0.3),
    case("alone", num_kv_heads=6), case("single tokens", lengths=Lengths((1, 1), (1, 1))),
    case("bounds", options={"host_lengths": "bounds"}), case("32", head_dim=32), case("72", head_dim=72),
]  # fmt: skip


def make():
    return [cuda_flashinfer.stand_in("sm_90")]


def make_geforce():
    return [cuda_flashinfer.stand_in("sm_120")]


BOTH = [(mine(HOPPER), make), (mine(GEFORCE), make_geforce)]


@pytest.mark.parametrize("place", BOTH, ids=["hopper", "geforce"])
@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_grid(case, place):
    rows, stand_ins = place
    check(rows, case, *stand_ins())


def test_widths_below_64_are_native_on_hopper_and_padded_on_geforce():
    widths = []
    for rows, stand_ins in BOTH:
        with installed(*stand_ins()):
            widths += [bound(rows, c).bindings["encode"].head_dim for c in GRID if c.name in ("32", "72")]
    assert widths == [32, 80, 64, 128]


@pytest.mark.parametrize(("spec", "options"), [
    ({"dtype": "float16"}, {}), ({"sliding_window": 5}, {}), ({"logit_softcap": 2.0}, {}), ({}, {"lse": True}),
    ({"attn_type": "decoder"}, {}), ({"alibi_slopes": (0.5,) * 6}, {}),
], ids=["float16", "window", "softcap", "lse", "decoder", "alibi"])  # fmt: skip
def test_what_it_lacks_is_refused(spec, options):
    for rows, stand_ins in BOTH:
        with installed(*stand_ins()), pytest.raises(NoBackendError):
            bound(rows, case("", **spec, options=options))


def sliced():
    """q, k and v as slices of one projection, as engines have them."""
    found = []
    for rows, stand_ins in BOTH:
        with installed(*stand_ins()):
            step = make_step(bound(rows, GRID[0]), GRID[0])
        want = step.run(return_lse=False)
        step.q, step.k, step.v = (torch.cat((t, t), -1)[..., : t.shape[-1]] for t in (step.q, step.k, step.v))
        found += [] if torch.equal(step.run(return_lse=False), want) else ["strided inputs are read wrongly"]
    return found


def test_strided_inputs():
    assert not sliced()


def everything():
    for rows, stand_ins in BOTH:
        yield from attempts(rows, GRID, stand_ins)
    yield sliced


MUTATIONS = mutations(ADAPTER, {
    "causal": (', mask_mode="padding"', ""),
    "scale default": ("step.max_kv, scale, 1.0,", "step.max_kv, q.shape[-1] ** -0.5, 1.0,"),
    "scales swapped": ("scale, 1.0, step.rows", "1.0, scale, step.rows"),
    "apart everywhere": ('if "wgmma" in b.device.isa else', "if True else"),
    "stacked behind": ("torch.stack((k, v), 1)", "torch.stack((k, v), 0)"),
    "values before keys": ("torch.stack((k, v), 1)", "torch.stack((v, k), 1)"),
    "k as it lies": ("k.contiguous(), v.contiguous()", "k, v.contiguous()"),
    "q as it lies": ("return q.contiguous(), torch", "return q, torch"),
    "longest swapped": ("step.max_query, step.max_kv,", "1, step.max_kv,"),
    "longest context short": ("step.max_query, step.max_kv,", "step.max_query, step.max_query - 1,"),
    "offsets of the step before": ("        super().fill(batch)\n", "        super().fill(batch) if not hasattr(self, 'rows') else None\n"),
    "workspace of another device": ("self.workspace = workspace(device).zero_()", "self.workspace = workspace(device)[:8].zero_()"),
})  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())


@pytest.mark.parametrize("place", BOTH, ids=["hopper", "geforce"])
def test_batches_and_devices_in_flight_do_not_meet(place):
    rows, stand_ins = place
    pairs = [(rows, c) for c in GRID if c.name in ("64", "128", "own scale", "32")]
    check_isolation(pairs, stand_ins)
    check_two_devices(pairs, stand_ins)
