"""8-bit floats to float16 by moving bits: torch converts them one by one on CPUs, ten times as slowly.

All have 1 sign bit, and e4m3 and e5m2 are float16 with fewer bits: shifted into place, the value is off by a power of
two only, the difference of the exponents' biases. That factor goes where the cache's scale goes, so nothing is lost.
Subnormal numbers come out right; the codes of NaN become large numbers in e4m3 (a cache holds none).
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 2.0**8,  # bias 7 against 15
    torch.float8_e4m3fnuz: 2.0**7,
    torch.float8_e5m2: 1.0,
}
"""What the result of :func:`unpack` must be multiplied by."""

_SHIFT = {torch.float8_e4m3fn: 7, torch.float8_e4m3fnuz: 7, torch.float8_e5m2: 8}
_NOT_BIT_14 = ~(1 << 14)
"""The sign, extended to 16 bits and shifted by 7, fills bit 14 too."""


def unpack(stored: Tensor, storage: torch.dtype, room: Tensor) -> Tensor:
    """``stored`` (int8, the bytes) as float16 in ``room`` (int16, the same shape); values times UNIT are the stored
    ones."""
    room.copy_(stored).mul_(1 << _SHIFT[storage])  # a shift, but vectorised
    if _SHIFT[storage] == 7:
        room.bitwise_and_(_NOT_BIT_14)
    return room.view(torch.float16)
