"""The judge of all tests notices kernels that are a little wrong, and lets rounding pass."""

from __future__ import annotations

import math

import pytest
import torch

from attn_core.testing.compare import differences
from attn_core.testing.reference import attend, visible

TOKENS, KEYS, HEADS, KV_HEADS, WIDTH, PAGE = 5, 200, 6, 3, 32, 16
WINDOW, SCALE = 120, WIDTH**-0.5
SLOPES = (0.02, 0.01, 0.005, 0.003, 0.002, 0.001)


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, HEADS, WIDTH, generator=g)
    k, v = (torch.randn(KEYS, KV_HEADS, WIDTH, generator=g) for _ in range(2))
    return q, k, v, torch.randn(HEADS, generator=g)


def right(inputs, dtype, **wrong):
    """The kernel with everything on; ``wrong`` replaces one of its arguments."""
    q, k, v, sinks = inputs
    q, k, v = (t.to(dtype) for t in (q, wrong.pop("k", k), wrong.pop("v", v)))
    seen = wrong.pop("seen", visible(TOKENS, KEYS, sliding_window=WINDOW))
    given = {"scale": SCALE, "softcap": 3.0, "alibi_slopes": SLOPES, "offset": KEYS - TOKENS, "sinks": sinks, **wrong}
    o, lse = attend(q, k, v, seen, **given)
    return o.to(dtype), lse.float()


def without(seen, keys):
    seen = seen.clone()
    seen[:, keys] = False
    return seen


SEEN = visible(TOKENS, KEYS, sliding_window=WINDOW)
WRONG = {
    "window one too long": {"seen": visible(TOKENS, KEYS, sliding_window=WINDOW + 1)},
    "window one too short": {"seen": visible(TOKENS, KEYS, sliding_window=WINDOW - 1)},
    "causality one late": {"seen": visible(TOKENS, KEYS, sliding_window=WINDOW) & visible(TOKENS, KEYS).roll(-1, 1)},
    "sinks dropped": {"sinks": None},
    "scale 1 % off": {"scale": SCALE * 1.01},
    "alibi with the wrong sign": {"alibi_slopes": tuple(-s for s in SLOPES)},
    "alibi one position off": {"alibi_slopes": SLOPES, "offset": KEYS - TOKENS + 1},
    "softcap ignored": {"softcap": None},
    "softcap 4 for 3": {"softcap": 4.0},
    "last page dropped": {"seen": without(SEEN, slice(KEYS // PAGE * PAGE, KEYS))},
    "a page in the middle dropped": {"seen": without(SEEN, slice(96, 112))},
    "one key dropped": {"seen": without(SEEN, slice(150, 151))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_noticed(inputs, name, dtype):
    want, want_lse = right(inputs, torch.float64)
    o, lse = right(inputs, dtype, **WRONG[name])
    assert differences(o, want, dtype, lse=lse, want_lse=want_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wrong_heads_are_noticed(inputs, dtype):
    _, k, v, _ = inputs
    want, _ = right(inputs, torch.float64)
    swapped = right(inputs, dtype, k=k[:, [1, 0, 2]], v=v[:, [1, 0, 2]])[0]
    assert differences(swapped, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wrong_log_sum_exps_are_noticed(inputs, dtype):
    want, want_lse = right(inputs, torch.float64)
    o, lse = right(inputs, dtype)
    square, square_lse = o[:HEADS], lse[:, :TOKENS]  # as many heads as tokens, or the shape gives it away
    for wrong in (lse.T, lse / math.log(2), lse + 1e-2, lse.double(), lse.masked_fill(lse == lse.max(), -math.inf)):
        assert differences(o, want, dtype, lse=wrong, want_lse=want_lse)
    assert differences(square, want[:HEADS], dtype, lse=square_lse.T.contiguous(), want_lse=want_lse[:, :TOKENS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_passes(inputs, dtype):
    q, k, v, sinks = inputs
    rounded = tuple(t.to(dtype) for t in (q, k, v))
    want, want_lse = right((*rounded, sinks), torch.float64)
    o, lse = right((*rounded, sinks), dtype)
    assert not differences(o, want, dtype, lse=lse, want_lse=want_lse)


def test_nan_and_wrong_shapes_are_noticed():
    want = torch.zeros(3, 2, 4, dtype=torch.float64)
    assert differences(want.float().index_fill(0, torch.tensor([1]), math.nan), want, torch.float32)
    assert "shape" in differences(want.float()[:, :1], want, torch.float32)[0]
    lse = torch.full((3, 2), -math.inf)
    assert differences(want.float(), want, torch.float32, lse=torch.zeros(3, 2), want_lse=lse.double())
    assert not differences(want.float(), want, torch.float32, lse=lse, want_lse=lse.double())
