"""Huawei Ascend NPUs for attn-core: which are here, and what their kernels promise.

Declarations only. The kernel adapters are not shipped yet: every row has ``bind=None``, so decisions can be made and
explained, and binding one raises ``BindError`` ("declared, adapter not yet shipped"). Importing this imports no torch,
no kernel package and touches no device.
"""

from __future__ import annotations

from collections.abc import Iterable

from attn_core.hookspecs import hookimpl
from attn_core.spec import BackendSpec, Device, PlatformSpec
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
