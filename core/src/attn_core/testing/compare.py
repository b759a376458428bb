"""Whether a kernel's result is the reference's, up to what its dtype can hold. One judge for all tests.

float32: 2e-5 absolute (for outputs of magnitude up to 1; relative above). Half precision: ``ulps`` units in the last
place of the largest value of the same token and head, so that a small result is not judged by a large neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32 = 2e-5
LSE_HALF = 5e-4
"""Log-sum-exp from half-precision inputs; kernels' fast exponentials are the largest part of it."""


def differences(
    got: Tensor,
    want: Tensor,
    dtype: torch.dtype,
    *,
    lse: Tensor | None = None,
    want_lse: Tensor | None = None,
    ulps: float = 2.0,
) -> list[str]:
    """What is wrong with ``got`` ``(tokens, heads, width)`` and ``lse`` ``(tokens, heads)``; empty when nothing is.

    ``dtype`` is the dtype the kernel ran in.
    """
    found = []
    if tuple(got.shape) != tuple(want.shape):
        return [f"output has shape {tuple(got.shape)}, expected {tuple(want.shape)}"]
    size = want.abs().amax(-1, keepdim=True)
    found += _worst("output", got, want, _allowed(size, dtype, ulps))
    if lse is not None and want_lse is not None:
        if tuple(lse.shape) != tuple(want_lse.shape):
            return [*found, f"lse has shape {tuple(lse.shape)}, expected {tuple(want_lse.shape)}"]
        if lse.dtype != torch.float32:
            found.append(f"lse has dtype {lse.dtype}, expected torch.float32")
        finite = want_lse.masked_fill(want_lse == float("-inf"), 0.0)
        unit = FLOAT32 if dtype == torch.float32 else LSE_HALF
        found += _worst("lse", lse, want_lse, unit * finite.abs().clamp(min=1.0))
    return found


def assert_same(
    got: Tensor,
    want: Tensor,
    dtype: torch.dtype,
    *,
    lse: Tensor | None = None,
    want_lse: Tensor | None = None,
    ulps: float = 2.0,
) -> None:
    """Raise AssertionError with what :func:`differences` finds."""
    if found := differences(got, want, dtype, lse=lse, want_lse=want_lse, ulps=ulps):
        raise AssertionError("; ".join(found))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring values of ``dtype`` at magnitude ``x`` (subnormals count as the least normal)."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().double().clamp(min=info.tiny)))) * info.eps


def _allowed(size: Tensor, dtype: torch.dtype, ulps: float) -> Tensor:
    return FLOAT32 * size.clamp(min=1.0) if dtype == torch.float32 else ulps * ulp(size, dtype)


def _worst(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> list[str]:
    """The element that exceeds its allowance most, with its place. NaN anywhere is worse than everything."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    if not got.numel():
        return []
    same = got == want  # equal infinities have no difference
    excess = torch.where(same, 0.0, (got - want).abs() / allowed.broadcast_to(got.shape))
    excess = excess.masked_fill(got.isnan(), float("inf"))
    if not bool((excess > 1.0).any()):
        return []
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    count = int((excess > 1.0).sum())
    limit = float(allowed.broadcast_to(got.shape)[at])
    return [
        f"{name}{list(at)} is {float(got[at]):.6g}, expected {float(want[at]):.6g} "
        f"(off by {abs(float(got[at] - want[at])):.3g}, allowed {limit:.3g}); {count} of {got.numel()} are off"
    ]
