"""The contract between core and vendor plugins: four hooks that return facts, none that choose.

A plugin is a module named by an entry point in group :data:`GROUP`. It implements any subset of these hooks::

    from attn_core.hookspecs import hookimpl

    @hookimpl
    def attn_backends(device):
        ...

All hooks are optional, there are no wrappers, no ``firstresult`` and no ordering. The core calls each plugin by
itself, consumes generators inside its guard, validates every item, and stamps the plugin's name on it. A hook that
raises costs its plugin only and appears in every explanation. The group name carries the major version of this
contract: a plugin for another major is listed, never imported. A hook may leave out arguments it does not use.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec

API_MAJOR = 1
GROUP_PREFIX = "attn_core.v"
GROUP = f"{GROUP_PREFIX}{API_MAJOR}"

hookspec = pluggy.HookspecMarker("attn_core")
hookimpl = pluggy.HookimplMarker("attn_core")
"""Marks a plugin's functions as hooks. Use it bare: no wrappers, no ordering."""


@hookspec
def attn_platforms() -> Iterable[PlatformSpec]:  # type: ignore[empty-body]
    """Static facts about the vendor's runtime. Called when plugins load.

    Imports nothing heavy, touches no device. ``known`` devices and ``aliases`` are what ``simulate()`` understands.
    """


@hookspec
def attn_probe_devices() -> Iterable[Device]:  # type: ignore[empty-body]
    """The devices of this machine, in index order, respecting the vendor's visibility variable.

    Called once, in a child process with a time limit. Creates no context and imports no vendor runtime. An empty
    result means absent; raise to say that a device is there but broken.
    """


@hookspec
def attn_backends(device: Device) -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Promises for this device: one row per backend and role. Imports no kernels.

    Called for devices of any platform; return nothing for those you do not serve. Give every row whether or not its
    package is installed: ``requires`` says what it needs, and the core explains what is missing.
    """


@hookspec
def attn_constraints(device: Device) -> Iterable[Constraint]:  # type: ignore[empty-body]
    """Rules on combinations, applied only where one of this plugin's own backends takes part."""
