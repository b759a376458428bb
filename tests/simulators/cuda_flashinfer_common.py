"""What the stand-ins of FlashInfer's wrappers and functions check alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from simulators.contract import Contract, Misuse, Refused
from simulators.flash import check_index

FACTS = Contract.load("flashinfer")
LOG2E = 1 / math.log(2)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WORKSPACE_BYTES = 32 << 20
"""Less than this is taken for a mistake: 128 MiB are recommended."""


def host_ints(where: str, name: str, t: Tensor, shape: tuple[int | None, ...]) -> list[int]:
    """Index arrays that plan() reads on the host; on a device it would wait for it."""
    if t.device.type != "cpu":
        raise Misuse(f"{where}: {name} lies on {t.device}: plan() copies it to the host and waits")
    check_index(where, name, t, t.device, shape)
    return list(t.tolist())


def check_workspace(where: str, buffer: Tensor, device: torch.device) -> None:
    if buffer.device != device:
        raise Refused(f"{where}: the workspace is on {buffer.device}, q on {device}")
    if buffer.numel() * buffer.element_size() < WORKSPACE_BYTES:
        raise Misuse(f"{where}: a workspace of {buffer.numel() * buffer.element_size()} bytes overflows")


def base2(lse: Tensor) -> Tensor:
    """(heads, tokens) natural -> (tokens, heads) base 2."""
    return (lse * LOG2E).T.contiguous()


def nhd(cache: Tensor, layout: str) -> Tensor:
    if layout not in ("NHD", "HND"):
        raise Refused(f"kv_layout {layout!r} is not NHD or HND")
    if cache.stride(-1) != 1:
        raise Refused("the last dimension of the cache must be contiguous")
    return cache if layout == "NHD" else cache.transpose(1, 2)


def dtype_of(d: Any) -> torch.dtype:
    found = getattr(torch, d) if isinstance(d, str) else d
    assert isinstance(found, torch.dtype)
    return found
