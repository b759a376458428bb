"""Groups of different padded widths, batches and backends in flight at once answer as if each were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attn_core.testing.compare import differences
from simulators import ascend_npu
from simulators.harness import (
    DECODE,
    RAGGED,
    Case,
    Lengths,
    bound,
    device,
    make_step,
    mutated,
    mutations,
    rows_of,
)
from simulators.isolation import check_isolation, one
from simulators.standin import installed

ROWS = rows_of("ascend", device("ascend", "910b"), "ascend")


def latent(heads: int) -> Case:
    return Case(name=f"mla, {heads} heads", spec={"kind": "mla", "num_heads": heads}, lengths=DECODE, lse=False)


def encoder(width: int) -> Case:
    return Case(name=f"encoder {width}", spec={"attn_type": "encoder_only", "head_dim": width}, lengths=RAGGED)


IN_FLIGHT = [
    (ROWS, encoder(32)),  # padded to 64
    (ROWS, encoder(80)),  # padded to 128
    (ROWS, latent(3)),  # padded to 4
    (ROWS, latent(5)),  # padded to 8
    (ROWS, Case(name="sinks", spec={"sinks": True})),
    (ROWS, Case(name="window, heads first", spec={"sliding_window": 5}, options={"kv_layout": "HND"})),
]


def make():
    return [ascend_npu.stand_in()]


def test_isolation():
    check_isolation(IN_FLIGHT, make)


def encoders() -> None:
    """Two steps of one encoder with other lengths, planned before either runs."""
    case = encoder(64)
    with installed(*make()):
        group = bound(ROWS, case)
    steps = [make_step(group, replace(case, lengths=Lengths(n, n))) for n in ((5, 1, 17), (4, 9))]
    for step in steps:
        got, want = step.run(return_lse=True), step.want()
        assert not differences(got[0], want[0], got[0].dtype, lse=got[1], want_lse=want[1])


def test_encoders_in_flight():
    encoders()


def all_in_flight() -> None:
    encoders()
    check_isolation(IN_FLIGHT, make)


PAGES = "return Pages(names, always, None if capture is None else"
SHARED = [
    *mutations(
        "attn_plugin_ascend.kernels.fia",
        {
            "one step over rows per backend": one("Rows(names)"),
            "one step over pages per backend": (
                PAGES, f"return vars(make).setdefault('kept', Pages(names, always, None)) if capture is None else {PAGES[7:]}",
            ),
        },
    ),
    *mutations(
        "attn_plugin_ascend.kernels.kv_write",
        {
            "one list of slots per backend": (
                "step = Slots(capture) if out is None else out",
                "step = plan.__dict__.setdefault('step', Slots(None))",
            )
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutation", SHARED, ids=lambda m: m.what)
def test_shared_steps_are_noticed(mutation):
    with mutated(mutation), pytest.raises((AssertionError, RuntimeError)):
        all_in_flight()
