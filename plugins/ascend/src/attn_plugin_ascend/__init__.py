"""Huawei Ascend NPUs for attn-core: which are here, and what their kernels promise.

The adapters in ``kernels`` bind torch_npu's operators; ``backends`` says what they promise. Importing this imports no
torch, no kernel package and touches no device.
"""

from __future__ import annotations

from collections.abc import Iterable

from attn_core.hookspecs import hookimpl
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec
from attn_plugin_ascend import backends, platform, probe

__version__ = "0.1.0"


@hookimpl
def attn_platforms() -> Iterable[PlatformSpec]:
    return (platform.PLATFORM,)


@hookimpl
def attn_probe_devices() -> Iterable[Device]:
    return probe.probe()


@hookimpl
def attn_backends(device: Device) -> Iterable[BackendSpec]:
    return backends.ROWS if device.platform == platform.PLATFORM.name else ()


@hookimpl
def attn_constraints(device: Device) -> Iterable[Constraint]:
    return backends.RULES if device.platform == platform.PLATFORM.name else ()
