"""Sequences of one length go through the encoder's kernel together, and come out as they would alone."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Lengths, bind, encode_step, spec

ALIKE = Lengths((7, 7, 7), (7, 7, 7))
ENCODER = {"attn_type": "encoder_only", "num_heads": 6, "num_kv_heads": 6}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    ("fields", "lengths"),
    [({}, ALIKE), ({"scale": 0.3}, ALIKE), ({}, Lengths((7,), (7,))), ({"sliding_window": 20}, ALIKE),
     ({"sliding_window": 3}, ALIKE), ({"num_kv_heads": 3}, ALIKE), ({"sinks": True}, ALIKE), ({"bias": True}, ALIKE),
     ({"v_head_dim": 24}, ALIKE), ({}, Lengths((7, 5, 7), (7, 5, 7)))],
)  # fmt: skip
def test_against_the_reference(fields, lengths, dtype, lse):
    made = encode_step(bind(spec(dtype=dtype, **{**ENCODER, **fields}), lse=lse), lengths)
    made.check(lse=lse)
    strided = made.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(made.group.forward(strided, made.k, made.v, None, made.plan, **made.extra), made.run())


def test_only_what_is_alike_is_planned_so_and_a_refill_forgets():
    group = bind(spec(**ENCODER))
    alike, unlike = encode_step(group, ALIKE), encode_step(group, Lengths((7, 5), (7, 5)))
    assert alike.plan.encode.alike is not None
    assert unlike.plan.encode.alike is None
    assert group.plan(unlike.batch, out=alike.plan).encode.alike is None
