"""NVIDIA GPUs for attn-core: which are here, what their kernels promise, the rules among them, and adapters.

The rows of the ``backends`` modules name the adapters in ``kernels``, which are imported when a backend is bound.
Importing this imports no torch, no kernel package and touches no device.
"""

from __future__ import annotations

from collections.abc import Iterable

from attn_core.hookspecs import hookimpl
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec
from attn_plugin_cuda import (
    backends,
    backends_dual_chunk,
    backends_flash,
    backends_flashinfer,
    backends_mla,
    platform,
    probe,
)

__version__ = "0.1.0"

_TABLES = (backends, backends_flashinfer, backends_flash, backends_mla, backends_dual_chunk)
_RULES = (*backends.RULES, *backends_flashinfer.RULES, *backends_flash.RULES, *backends_dual_chunk.RULES)


@hookimpl
def attn_platforms() -> Iterable[PlatformSpec]:
    return (platform.PLATFORM,)


@hookimpl
def attn_probe_devices() -> Iterable[Device]:
    return probe.probe()


@hookimpl
def attn_backends(device: Device) -> Iterable[BackendSpec]:
    """Every row, whether or not the device can run it: the core explains why not."""
    if device.platform != platform.PLATFORM.name:
        return ()
    return tuple(row for table in _TABLES for row in table.rows(device))


@hookimpl
def attn_constraints(device: Device) -> Iterable[Constraint]:
    return _RULES if device.platform == platform.PLATFORM.name else ()
