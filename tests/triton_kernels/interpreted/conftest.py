"""These run in a process of their own, under TRITON_INTERPRET=1: tests/triton_kernels/test_interpreter.py starts it.

The interpreter computes two things wrongly without saying so, and they are put right here. ``test_traps.py`` asserts
that both patches are still needed.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

torch.set_num_threads(1)

Builder = interpreter.InterpreterBuilder
DOT, CONVERT = Builder.create_dot, Builder.create_fp_to_fp
FLOAT8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def _dot(self, a, b, d, *rest):
    """bfloat16 is held as its bits in uint16, and the product multiplies those. As float32 they are right."""
    return DOT(self, _float32(a), _float32(b), d, *rest)


def _float32(handle):
    if handle.dtype.scalar.name != "bf16":
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _convert(self, source, target, rounding):
    """Rounding up to the next power of two loses the carry in 8-bit floats: 0.49 becomes 0.25."""
    to = FLOAT8.get(target.scalar.name)
    if to is None or source.dtype.scalar.name != "fp32":
        return CONVERT(self, source, target, rounding)
    data = torch.from_numpy(np.ascontiguousarray(source.data)).to(to).view(torch.uint8).numpy()
    return interpreter.TensorHandle(data, target.scalar)


Builder.create_dot, Builder.create_fp_to_fp = _dot, _convert
