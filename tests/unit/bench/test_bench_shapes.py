"""What a shape moves and computes is counted right."""

from __future__ import annotations

import pytest

from attn_core import BadInputError
from attn_core.bench.shapes import KINDS, SIZES, chosen, grid
from attn_core.testing.reference import visible


@pytest.mark.parametrize("shape", grid("smoke", "bfloat16"), ids=lambda s: s.name)
def test_pairs_are_those_the_reference_lets_a_query_see(shape):
    seen = sum(
        int(visible(n, m, attn_type=shape.spec.attn_type).sum()) for n, m in zip(shape.query_lens, shape.kv_lens)
    )
    assert shape.pairs == seen


def test_bytes_and_flops_of_a_decode_step():
    (shape,) = [s for s in grid("smoke", "bfloat16") if s.kind == "decode"]  # 2 sequences, 40 keys, 4/2 heads of 32
    assert shape.flops(absorbed=False) == 2 * (2 * 40) * 4 * (32 + 32)
    q_and_out, keys = 2 * 4 * (32 + 32) * 2, 2 * 40 * 2 * (32 + 32)
    assert shape.moved(absorbed=False, kv_bytes=2) == q_and_out + keys * 2
    assert shape.moved(absorbed=False, kv_bytes=1) == q_and_out + keys


def test_latent_rows_are_read_once_for_keys_and_values():
    (shape,) = [s for s in grid("smoke", "float32") if s.kind == "mla_decode"]  # latent 32, rope 16, 2 heads
    assert shape.moved(absorbed=True, kv_bytes=4) == 2 * 2 * (48 + 32) * 4 + 2 * 40 * 48 * 4
    assert shape.flops(absorbed=True) == 2 * (2 * 40) * 2 * (48 + 32)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_every_kind(size):
    assert {s.kind for s in grid(size, "bfloat16")} == set(KINDS)


def test_an_unknown_kind_or_size_is_named():
    with pytest.raises(BadInputError, match="did you mean 'decode'"):
        chosen("smoke", "bfloat16", ("decod",))
    with pytest.raises(BadInputError, match="huge"):
        grid("huge", "bfloat16")
