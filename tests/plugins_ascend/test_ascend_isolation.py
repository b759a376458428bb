"""Groups of different padded widths, batches and backends in flight at once answer as if each were alone."""

from __future__ import annotations

import pytest

from simulators import ascend_npu
from simulators.harness import DECODE, RAGGED, Case, device, mutated, mutations, rows_of
from simulators.isolation import check_isolation, one

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


SHARED = [
    *mutations(
        "attn_plugin_ascend.kernels.fia",
        {
            "one step over rows per backend": one("Rows(names)"),
            "one step over pages per backend": (
                "return Pages(names, None if capture",
                "return vars(make).get('kept') or vars(make).setdefault('kept', Pages(names, None)) if not capture else "
                "Pages(names, None if capture",
            ),
        },
    ),
    *mutations(
        "attn_plugin_ascend.kernels.kv_write",
        {
            "one list of slots per backend": (
                "fill = refilled(Slots)", "fill = refilled(lambda capture, kept=[]: (kept.append(Slots(None)), kept[0])[1])"
            )
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutation", SHARED, ids=lambda m: m.what)
def test_shared_steps_are_noticed(mutation):
    with mutated(mutation), pytest.raises((AssertionError, RuntimeError)):
        check_isolation(IN_FLIGHT, make)
