"""What the interpreter gets wrong, asserted: a trap that closes upstream fails here, and its workaround may go."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from conftest import CONVERT, DOT


@triton.jit
def product(a, b, out, side: tl.constexpr):
    at = tl.arange(0, side)[:, None] * side + tl.arange(0, side)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def convert(a, out, side: tl.constexpr):
    at = tl.arange(0, side)
    tl.store(out + at, tl.load(a + at).to(out.dtype.element_ty))


def multiply(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=g).to(dtype) for _ in range(2))
    out = torch.zeros(16, 16)
    product[(1,)](a, b, out, 16)
    return out, a.float() @ b.float()


def test_products_of_bfloat16_are_wrong_without_the_patch(monkeypatch):
    got, want = multiply(torch.bfloat16)
    assert torch.allclose(got, want, atol=1e-5)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", DOT)
    with np.errstate(all="ignore"):
        got, _ = multiply(torch.bfloat16)
    assert not torch.allclose(got, want, atol=1.0), "upstream multiplies bfloat16 now: the patch in conftest.py may go"


def test_products_of_others_are_right_without_it(monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", DOT)
    for dtype in (torch.float16, torch.float32):
        got, want = multiply(dtype)
        assert torch.allclose(got, want, atol=1e-4)


def test_integers_to_bfloat16_are_wrong():
    out = torch.zeros(16, dtype=torch.bfloat16)
    convert[(1,)](torch.arange(16, dtype=torch.int8), out, 16)
    assert not torch.equal(out.float(), torch.arange(16.0)), "upstream converts: load_keys may go to bfloat16 directly"


def test_rounding_to_8_bit_floats_is_wrong_without_the_patch(monkeypatch):
    given = torch.full((16,), 0.4858)
    out = torch.zeros(16, dtype=torch.float8_e4m3fn)
    convert[(1,)](given, out, 16)
    assert torch.equal(out.float(), torch.full((16,), 0.5))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", CONVERT)
    convert[(1,)](given, out, 16)
    assert not torch.equal(out.float(), torch.full((16,), 0.5)), "upstream carries now: the patch in conftest.py may go"
