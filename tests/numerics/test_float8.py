"""Unpacking 8-bit floats by bits: all 256 codes of each dtype, NaN aside."""

from __future__ import annotations

import pytest
import torch

from attn_core.backends.torch_native.float8 import UNIT, unpack


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_every_code_keeps_its_value(dtype):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.int8)
    want = codes.view(dtype).float()
    got = unpack(codes, dtype, torch.empty(256, dtype=torch.int16)).float() * UNIT[dtype]
    known = ~want.isnan()
    assert int(known.sum()) >= 250
    assert torch.equal(got[known], want[known])
    assert torch.equal(got[known].signbit(), want[known].signbit())
    if dtype == torch.float8_e5m2:
        assert bool(got[~known].isnan().all())
