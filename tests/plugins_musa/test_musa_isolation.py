"""Groups of different padded widths, batches and backends in flight at once answer as if each were alone."""

from __future__ import annotations

import pytest

from simulators import musa_mate
from simulators.harness import DECODE, RAGGED, Case, Lengths, device, mutated, mutations, rows_of
from simulators.isolation import check_isolation, one

MP31 = device("musa", "mp31")
FA3, FLASHMLA = (rows_of("musa", MP31, name) for name in ("fa3", "flashmla"))
LATENT = {"kind": "mla"}
OTHERS = Lengths((3, 40), (3, 40))
IN_FLIGHT = [
    (FA3, Case(name="40, padded to 64", spec={"attn_type": "encoder_only", "head_dim": 40}, lengths=RAGGED)),
    (FA3, Case(name="100, padded to 128", spec={"attn_type": "encoder_only", "head_dim": 100}, lengths=OTHERS)),
    (FA3, Case(name="decode", lengths=DECODE)),
    (FA3, Case(name="window", spec={"sliding_window": 5, "head_dim": 128})),
    (FA3, Case(name="latent", spec=LATENT, lengths=DECODE)),
    (FA3, Case(name="latent, 2 heads", spec={**LATENT, "num_heads": 2}, lengths=DECODE)),
    (FLASHMLA, Case(name="flashmla", spec=LATENT, lengths=DECODE)),
]


def make():
    return [musa_mate.stand_in()]


def test_isolation():
    check_isolation(IN_FLIGHT, make)


SHARED = mutations(
    "attn_plugin_musa.kernels.fa3",
    {
        "one paged step per backend": (
            "step = Scheduled(page_size, capture) if out is None else out",
            "step = plan.__dict__.setdefault('step', Scheduled(page_size, capture))",
        ),
        "one latent step per backend": one("Latent(page_size, capture, device)"),
        "one ragged step for all backends": (
            "refilled(lambda _: Ragged())",
            "refilled(lambda _: vars(Ragged).get('only') or setattr(Ragged, 'only', Ragged()) or Ragged.only)",
        ),
    },
)


@pytest.mark.parametrize("mutation", SHARED, ids=lambda m: m.what)
def test_shared_steps_are_noticed(mutation):
    with mutated(mutation), pytest.raises((AssertionError, RuntimeError)):
        check_isolation(IN_FLIGHT[:6], make)
