"""Core's own plugin: the CPU as a platform, and the backends that run wherever torch does. Same hooks as everybody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attn_core import cpu
from attn_core.hookspecs import hookimpl
from attn_core.spec import BackendSpec, Device, PlatformSpec


@hookimpl
def attn_platforms() -> Iterable[PlatformSpec]:
    return (cpu.PLATFORM,)


@hookimpl
def attn_probe_devices() -> Iterable[Device]:
    return (cpu.probe(),)


@hookimpl
def attn_backends(device: Device) -> Iterator[BackendSpec]:
    from attn_core.backends import builtin, flex_attention, torch_native, triton  # tables: not needed to list or probe

    for module in (torch_native, flex_attention, triton, builtin):
        yield from module.backends(device)
