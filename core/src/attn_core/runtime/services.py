"""Runtime services on any vendor, delegated to ``torch.accelerator`` where that covers them."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from attn_core.errors import AttnCoreError
from attn_core.spec import PlatformSpec

FREE = "privateuseone"
"""What torch calls the slot while nobody has taken it."""


def ready(spec: PlatformSpec) -> None:
    """Import the package that teaches torch the device; torch knows cpu, cuda and xpu by itself.

    Raises :class:`AttnCoreError` when another vendor's package has taken the one slot there is for such devices.
    """
    if spec.torch_module is None:
        return
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in (FREE, spec.torch_device):
        raise AttnCoreError(
            f"platform {spec.name} needs torch's device {spec.torch_device!r}, but this process already calls its one "
            f"slot for foreign devices (PrivateUse1) {taken!r}; do not import the other vendor's package, or set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 if torch imports it by itself"
        )
    importlib.import_module(spec.torch_module)


def set_device(spec: PlatformSpec, index: int) -> None:
    ready(spec)
    if spec.torch_device != "cpu":
        torch.accelerator.set_device_index(index)


def synchronize(spec: PlatformSpec) -> None:
    ready(spec)
    if spec.torch_device != "cpu":
        torch.accelerator.synchronize()


def memory_info(spec: PlatformSpec, index: int | None) -> tuple[int, int]:
    """(free, total) bytes. The host's free memory is what the kernel calls available."""
    ready(spec)
    if spec.torch_device == "cpu":
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    module = getattr(torch, spec.torch_device)
    free, total = module.mem_get_info(index)
    return int(free), int(total)


def empty_cache(spec: PlatformSpec) -> None:
    ready(spec)
    if spec.torch_device != "cpu":
        getattr(torch, spec.torch_device).empty_cache()


def make(spec: PlatformSpec, what: str) -> Any:
    """The platform's ``stream`` or ``graph`` class."""
    target = getattr(spec, what)
    if target is None:
        raise AttnCoreError(f"platform {spec.name} has no {what}s")
    ready(spec)
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
