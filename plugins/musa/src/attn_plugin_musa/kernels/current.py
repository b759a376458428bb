"""MATE allocates on the current device, not on its inputs'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def current(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which ``device`` is the current one. The host has no current device to set."""
    if device.type == "cpu":
        return nullcontext
    guard = getattr(torch, device.type).device
    return lambda: guard(device)
