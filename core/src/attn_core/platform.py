"""``get_platform()`` and ``simulate()``: the thin object an engine holds. Resolving imports no torch; binding does."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attn_core.catalog import Catalog, Installed
from attn_core.errors import AttnCoreError, BadInputError, BindError, MissingKernelError
from attn_core.plugins import Plugins, installed_packages, load_plugins
from attn_core.resolve import resolve
from attn_core.spec import AttentionSpec, Decision, Device, EngineOptions, ModelSpec, PlatformSpec
from attn_core.spec.check import DTYPES, nearest

if TYPE_CHECKING:
    from attn_core.runtime import AttentionBackend

_log = logging.getLogger("attn_core")
_GROUP_FIELDS = frozenset(f.name for f in fields(AttentionSpec))

ENV_PLATFORM = "ATTN_CORE_PLATFORM"


class Platform:
    """One vendor's devices, and the two questions an engine asks of them: which kernels, and give them to me.

    ``simulated`` platforms answer the first question for hardware that is not here, and refuse the second.
    """

    def __init__(
        self, spec: PlatformSpec, devices: tuple[Device, ...], plugins: Plugins, installed: Installed | None = None
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.devices = devices
        self.plugins = plugins
        self.simulated = installed is not None
        self._assumed = installed

    @property
    def device(self) -> Device:
        """The first device."""
        return self.devices[0]

    @cached_property
    def catalog(self) -> Catalog:
        """What every plugin declares for these devices."""
        return self.plugins.catalog(self.devices)

    @cached_property
    def installed(self) -> Installed:
        """Packages and toolkits that count as present; assumed ones for a simulated device."""
        if self._assumed is None:
            return installed_packages(self.catalog, self.devices)
        toolkits = {k: v for d in self.devices for k, v in d.versions.items()}
        return replace(self._assumed, versions={**toolkits, **self._assumed.versions})

    def resolve(self, model: Any = None, **options: Any) -> Decision:
        """Decide, without binding anything: no kernel is imported and no device touched.

        ``model`` is a :class:`ModelSpec`, an :class:`AttentionSpec`, named groups, or left out with the fields of an
        AttentionSpec among the keywords. Other keywords are :class:`EngineOptions`. Raises
        :class:`NoBackendError` with every reason, :class:`BadInputError` for a question that contradicts itself.
        """
        spec, engine = _question(model, options)
        decision = resolve(self.device, spec, engine, self.catalog, self.installed)
        _announce(decision)
        return decision

    def attention_backend(
        self, model: Any = None, *, device: int = 0, rank: int = 0, **options: Any
    ) -> AttentionBackend:
        """Decide and bind: the kernels of every group, as plain functions. Arguments as for :meth:`resolve`.

        ``device`` indexes :attr:`devices`; ``rank`` is the tensor-parallel rank (it slices alibi slopes). A kernel
        that turns out to be missing is a rejection: the core resolves again without it and says so in the decision.
        """
        if self.simulated:
            raise BindError(f"{self.device} is simulated: decisions can be explained, kernels cannot be bound")
        if not 0 <= device < len(self.devices):
            raise BadInputError(f"device={device} is not an index into the {len(self.devices)} devices of {self.name}")
        from attn_core.runtime.backend import bind_decision

        spec, engine = _question(model, options)
        installed = self.installed
        while True:
            decision = resolve(self.devices[device], spec, engine, self.catalog, installed)
            try:
                bound = bind_decision(decision, self.torch_device(device), rank=rank)
            except MissingKernelError as e:
                if e.bind is None or e.bind in installed.unusable:
                    raise
                _log.warning("%s cannot be bound: %s; resolving without it", e.backend, e)
                installed = replace(installed, unusable={**installed.unusable, e.bind: str(e)})
            else:
                _announce(decision)
                return bound

    # runtime services, the few that every engine needs on any vendor

    def torch_device(self, index: int | None = None) -> str:
        """What ``torch.device`` wants: ``cpu``, ``cuda:0``, ``npu:1``."""
        at = self.devices[index or 0].index
        return self.spec.torch_device if self.spec.torch_device == "cpu" else f"{self.spec.torch_device}:{at}"

    @property
    def dist_backend(self) -> str:
        return self.spec.dist_backend

    @property
    def fp8_dtype(self) -> str:
        """Name of the torch dtype that ``fp8_e4m3`` means on this device."""
        fnuz = any(token.endswith("fp8_fnuz") for token in self.device.isa)
        return "float8_e4m3fnuz" if fnuz else self.spec.fp8_dtype

    @cached_property
    def supported_dtypes(self) -> tuple[str, ...]:
        """Dtypes that some backend takes on this device."""
        rows = [
            b for d in self.catalog.devices.values() for b in d.backends if b.role in ("encode", "prefill", "decode")
        ]
        able = [b.accepts["dtype"] for b in rows if b.needs <= self.device.isa]
        return tuple(name for name in DTYPES if any(name in d for d in able))

    def set_device(self, index: int) -> None:
        self._services.set_device(self.spec, index)

    def synchronize(self) -> None:
        self._services.synchronize(self.spec)

    def memory_info(self, index: int | None = None) -> tuple[int, int]:
        """(free, total) bytes of a device; of the host for the CPU."""
        return self._services.memory_info(self.spec, index)  # type: ignore[no-any-return]

    def empty_cache(self) -> None:
        self._services.empty_cache(self.spec)

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """A new stream of the platform; raises :class:`AttnCoreError` where there are none."""
        return self._services.make(self.spec, "stream")(*args, **kwargs)

    def graph(self, *args: Any, **kwargs: Any) -> Any:
        """A new capture graph of the platform; raises :class:`AttnCoreError` where there are none."""
        return self._services.make(self.spec, "graph")(*args, **kwargs)

    @property
    def _services(self) -> Any:
        if self.simulated:
            raise AttnCoreError(f"{self.device} is simulated: it has no runtime to ask")
        from attn_core.runtime import services

        return services

    def __repr__(self) -> str:
        what = "simulated " if self.simulated else ""
        return f"<Platform {what}{self.name}: {', '.join(map(str, self.devices))}>"


def _question(model: Any, options: dict[str, Any]) -> tuple[ModelSpec, EngineOptions]:
    """Sort keywords into the model's and the engine's; each name belongs to exactly one of them."""
    group = {k: v for k, v in options.items() if k in _GROUP_FIELDS}
    engine = {k: v for k, v in options.items() if k not in _GROUP_FIELDS}
    if model is not None and group:
        raise BadInputError(
            f"{sorted(group)[0]} is a field of the model, which was given already; change the model instead"
        )
    return ModelSpec.of(model, **group), EngineOptions.of(**engine)


def _announce(decision: Decision) -> None:
    parts = [f"{name}: {' / '.join(c.backend for c in g.choices.values())}" for name, g in decision.groups.items()]
    values = ", ".join(f"{k} {v}" for k, v in decision.values.items())
    _log.info("attention on %s [%s] %s (%s)", decision.device, decision.digest, "; ".join(parts), values)


# the one platform of this process

_lock = threading.Lock()
_plugins: Plugins | None = None
_platforms: dict[str | None, Platform] = {}


def get_platform(name: str | None = None) -> Platform:
    """The platform of this process: the one named here or in ``ATTN_CORE_PLATFORM``, else the most specific present.

    Devices are probed once, whatever the number of threads; a forked child keeps its parent's answer. Raises
    :class:`BadInputError` for a platform that is not here, naming what is and which plugins failed.
    """
    try:
        return _platforms[name]
    except KeyError:
        pass
    with _lock:
        if name not in _platforms:
            _platforms[name] = _find(name or os.environ.get(ENV_PLATFORM) or None)
        return _platforms[name]


def _find(name: str | None) -> Platform:
    plugins = _shared_plugins()
    devices = plugins.probe()
    specs = plugins.platforms()
    if name is None:
        name = devices[0].platform if devices else "cpu"
    mine = tuple(d for d in devices if d.platform == name)
    if not mine or name not in specs:
        there = ", ".join(dict.fromkeys(d.platform for d in devices)) or "nothing"
        broken = "".join(f"; plugin {r.name} {r.status}: {r.error}" for r in plugins.reports if r.error)
        raise BadInputError(f"platform {name!r} has no device here; found: {there}{nearest(name, specs)}{broken}")
    return Platform(specs[name], mine, plugins)


def installed_plugins() -> Plugins:
    """The plugins of this process, loaded once."""
    with _lock:
        return _shared_plugins()


def _shared_plugins() -> Plugins:
    global _plugins
    if _plugins is None:
        _plugins = load_plugins()
    return _plugins


def _reset_after_fork() -> None:
    """A lock that another thread held while forking would never be released in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


# what-if


def simulate(
    device: str | Device,
    *,
    installed: bool = False,
    with_packages: Mapping[str, str] | None = None,
    without: tuple[str, ...] = (),
    plugins: Plugins | None = None,
) -> Platform:
    """The same object for a device that is not here: ``simulate("cuda:sm_121")``, ``simulate("rocm:mi300x")``.

    Every package that the plugins know counts as installed at the version it was written for. ``installed=True``
    takes what this environment really has; ``with_packages`` and ``without`` change single packages or toolkits.
    Raises :class:`BadInputError` for an unknown device, naming those known.
    """
    plugins = plugins or installed_plugins()
    if isinstance(device, str):
        device = find_device(device, plugins.platforms())
    spec = plugins.platforms().get(device.platform)
    if spec is None:
        raise BadInputError(_unknown_platform(device.platform, plugins))
    if installed:
        real = installed_packages(plugins.catalog((device,)), (device,))
        versions = {**real.versions, **(with_packages or {})}
        assumed = replace(real, versions=versions, without=frozenset(without))
    else:
        assumed = Installed(versions=with_packages or {}, assume=True, without=frozenset(without))
    return Platform(spec, (device,), plugins, assumed)


def find_device(text: str, platforms: Mapping[str, PlatformSpec]) -> Device:
    """Read ``platform:arch`` or ``platform:product``; the product keeps its name on the device."""
    platform, _, rest = text.strip().lower().partition(":")
    spec = platforms.get(platform)
    if spec is None:
        known = ", ".join(sorted(platforms))
        raise BadInputError(
            f"unknown device {text!r}: no installed plugin describes platform {platform!r}"
            f"{nearest(platform, platforms)}; platforms: {known}. "
            f"Install attn-plugin-{platform or 'NAME'} if it is a vendor's"
        )
    arch = spec.aliases.get(rest, rest)
    for d in spec.known:
        if d.arch.lower() == arch.lower():
            return replace(d, name=rest) if rest in spec.aliases and not d.name else d
    names = sorted({d.arch for d in spec.known} | set(spec.aliases))
    raise BadInputError(f"unknown device {text!r}{nearest(rest, names)}; {platform} knows {', '.join(names)}")


def _unknown_platform(name: str, plugins: Plugins) -> str:
    broken = "".join(f"; plugin {r.name} {r.status}: {r.error}" for r in plugins.reports if r.error)
    return f"no installed plugin describes platform {name!r}; known: {', '.join(sorted(plugins.platforms()))}{broken}"


__all__ = ["Platform", "find_device", "get_platform", "installed_plugins", "simulate"]
