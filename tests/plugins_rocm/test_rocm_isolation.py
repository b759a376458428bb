"""Groups of different padded head counts, batches, backends and devices in flight answer as if each were alone."""

from __future__ import annotations

import pytest

from simulators import rocm_aiter
from simulators.harness import DECODE, PREFILL, Case, device, mutated, mutations, rows_of
from simulators.isolation import check_isolation, check_two_devices, one

GFX942 = device("rocm", "gfx942")
ALL = rows_of("rocm", GFX942, "aiter")
CK = rows_of("rocm", GFX942, "aiter", unified=False, rank=0)
LATENT_ONLY = (tuple(r for r in ALL[0] if r.form == "absorbed"), *ALL[1:])
ONE = rows_of("rocm", GFX942, "aiter", unified=True)
FNUZ = {"kv_cache_dtype": "fp8_e4m3fnuz"}


def latent(heads: int) -> Case:
    return Case(name=f"mla, {heads} heads", spec={"kind": "mla", "num_heads": heads}, lengths=DECODE)


IN_FLIGHT = [
    (ALL, latent(4)),  # padded to 16
    (ALL, latent(12)),  # padded to 16 too, by other columns
    (ALL, latent(16)),
    (LATENT_ONLY, Case(name="mla prefill", spec={"kind": "mla", "num_heads": 16}, lengths=PREFILL, lse=False)),
    (CK, Case(name="paged", lse=False)),
    (CK, Case(name="paged, softcap", spec={"logit_softcap": 2.0, "head_dim": 128}, lse=False)),
    (ONE, Case(name="one kernel", spec={"sliding_window": 5, "sinks": True}, lse=False)),
    (ONE, Case(name="one kernel, fp8", options=FNUZ, scales=(0.5, 0.25), lse=False)),
]


def make():
    return [rocm_aiter.stand_in()]


def test_isolation():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


SHARED = [
    *mutations(
        "attn_plugin_rocm.kernels.mha",
        {
            "one prefill step per backend": one("Indexed(page_size, capture)"),
            "one decode step per backend": (
                "step = Partitioned(page_size, capture) if out is None else out",
                "step = plan.__dict__.setdefault('step', Partitioned(page_size, capture))",
            ),
        },
    ),
    *mutations(
        "attn_plugin_rocm.kernels.unified",
        {
            "one unified step per backend": one("Paged(page_size, capture)"),
        },
    ),
    *mutations(
        "attn_plugin_rocm.kernels.mla",
        {
            "one latent step per backend": (*one("Indexed(page_size, capture)"), 2),
        },
    ),
]


@pytest.mark.parametrize("mutation", SHARED, ids=lambda m: m.what)
def test_shared_steps_are_noticed(mutation):
    with mutated(mutation), pytest.raises((AssertionError, RuntimeError)):
        check_isolation(IN_FLIGHT[1:], make)
