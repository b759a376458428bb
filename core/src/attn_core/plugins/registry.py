"""The plugins of a process: what they declared, how each fared, and the devices they found."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from attn_core.catalog import Catalog, DeviceCatalog
from attn_core.errors import DeclarationError, PluginError
from attn_core.plugins import probe as probing
from attn_core.plugins.guard import ContainedError, Hooks
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec, PluginReport

_log = logging.getLogger("attn_core")


@dataclass(frozen=True, kw_only=True)
class Active:
    """A plugin that loaded, registered and declared its platforms."""

    name: str
    hooks: Hooks
    platforms: tuple[PlatformSpec, ...]
    reference: str | None
    """Where the probe process imports it; None: it is probed here (core, and objects that no import can name)."""


def failed(report: PluginReport, why: ContainedError) -> PluginReport:
    """The report of a plugin that is out, and how to be rid of it."""
    ways = f"repair or uninstall {report.dist or report.name}, or set ATTN_CORE_DISABLE_PLUGINS={report.name}"
    return replace(report, status="failed", error=str(why), hint=why.hint or ways)


def _works(report: PluginReport) -> bool:
    return report.status in ("ok", "absent")


class Plugins:
    """What :func:`load_plugins` gives. Hooks are asked once per device; answers are kept. Safe to share by threads."""

    def __init__(
        self, active: Sequence[Active], reports: Sequence[PluginReport], *, strict: bool, must_work: frozenset[str]
    ) -> None:
        self._active = tuple(sorted(active, key=lambda a: a.name))
        self._loaded = tuple(sorted(reports, key=lambda r: (r.name, r.dist, r.version)))
        self._strict, self._must_work = strict, must_work
        self._catalogs: dict[tuple[Device, ...], Catalog] = {}
        self._probed: probing.Probed | None = None
        self._warned: set[tuple[str, str | None]] = set()

    @property
    def reports(self) -> tuple[PluginReport, ...]:
        """How every plugin fared so far, by name: loading, probing, and every catalog made."""
        out = self._after(self._probed)
        for catalog in tuple(self._catalogs.values()):
            pairs = zip(out, catalog.reports)
            out = tuple(new if _works(old) and new.status == "failed" else old for old, new in pairs)
        return out

    def platforms(self) -> Mapping[str, PlatformSpec]:
        """Platform name -> facts, of every plugin that loaded, by name."""
        return {p.name: p for p in sorted((p for a in self._active for p in a.platforms), key=lambda p: p.name)}

    def catalog(self, devices: Device | Iterable[Device]) -> Catalog:
        """What all plugins declare for these devices, stamped with their names, and the reports that belong to it.

        A plugin that fails for one of the devices is out for all of them. How the probe went counts for devices that
        came from the probe, so that a what-if answers the same whether or not this process has probed.

        Raises :class:`PluginError` under ``strict``, or if a plugin that the allow list names failed.
        """
        key = (devices,) if isinstance(devices, Device) else tuple(devices)
        if key not in self._catalogs:
            self._catalogs[key] = self._declare(key)
        catalog = self._catalogs[key]
        self.enforce(catalog.reports)
        return catalog

    def _declare(self, devices: tuple[Device, ...]) -> Catalog:
        probed = self._probed if self._probed is not None and set(devices) <= set(self._probed.devices) else None
        before = self._after(probed)
        late: dict[str, ContainedError] = {}
        rows: dict[str, list[BackendSpec]] = {str(d): [] for d in devices}
        rules: dict[str, list[Constraint]] = {str(d): [] for d in devices}
        for a in (a for a in self._active if probed is None or a.name not in probed.failures):
            try:
                for name, (own_rows, own_rules) in _ask(a, devices).items():
                    rows[name] += own_rows
                    rules[name] += own_rules
            except ContainedError as e:
                late[a.name] = e
        return Catalog(
            devices={name: DeviceCatalog(tuple(rows[name]), tuple(rules[name])) for name in rows},
            reports=tuple(failed(r, late[r.name]) if _works(r) and r.name in late else r for r in before),
        )

    def probe(self, timeout: float | None = None) -> tuple[Device, ...]:
        """The devices of this machine, asked once per process; a forked child keeps its parent's answer.

        Runs every probe in one child process for at most ``timeout`` seconds (default ``ATTN_CORE_PROBE_TIMEOUT``,
        else 10). Sorted: the more specific platform first, the CPU last. Raises as :meth:`catalog` does.
        """
        if self._probed is None:
            with probing.lock():
                if self._probed is None:
                    self._probed = probing.probe(self._active, timeout)
        self.enforce(self._after(self._probed))
        return self._probed.devices

    def _after(self, probed: probing.Probed | None) -> tuple[PluginReport, ...]:
        """The load reports, with what probing showed of those that loaded."""
        if probed is None:
            return self._loaded
        out = []
        for r in self._loaded:
            if r.status == "ok" and r.name in probed.failures:
                r = failed(r, probed.failures[r.name])
            elif r.status == "ok" and r.name in probed.absent:
                r = replace(r, status="absent", hint=probed.notes.get(r.name, ""))
            elif r.status == "ok" and r.name in probed.notes:
                r = replace(r, hint=probed.notes[r.name])
            out.append(r)
        return tuple(out)

    def enforce(self, reports: Sequence[PluginReport]) -> None:
        """Raise :class:`PluginError` for failures that must not be contained; say the others aloud, each once."""
        bad = [r for r in reports if r.status in ("failed", "incompatible")]
        fatal = bad if self._strict else [r for r in bad if r.name in self._must_work]
        if fatal:
            why = "strict mode is on" if self._strict else "the user named it"
            lines = [f"plugin {r.name} ({r.dist or 'in-process'}) {r.status}: {r.error} ({r.hint})" for r in fatal]
            raise PluginError("\n".join([f"{why}, so a plugin that does not work is an error", *lines]))
        for r in bad:
            if (r.name, r.error) not in self._warned:
                self._warned.add((r.name, r.error))
                _log.warning("plugin %s is left out: %s", r.name, r.error)


def _ask(a: Active, devices: Iterable[Device]) -> Mapping[str, tuple[list[BackendSpec], list[Constraint]]]:
    """One plugin's rows and rules by device name, without repeats and stamped.

    Raises :class:`ContainedError` if any call fails. Devices of one name that differ in detail (memory) share what was
    promised for each of them.
    """
    out: dict[str, tuple[list[BackendSpec], list[Constraint]]] = {}
    for device in devices:

        def ours(row: BackendSpec, device: Device = device) -> None:
            if row.platform != device.platform:
                raise DeclarationError(
                    f"BackendSpec({row.backend!r}, {row.role!r}) is for platform {row.platform!r}, "
                    f"but the core asked for {device}; return nothing for devices you do not serve"
                )

        found = a.hooks.collect("attn_backends", BackendSpec, ours, device=device)
        rows = list(dict.fromkeys(replace(row, plugin=a.name) for row in found))
        found_rules = a.hooks.collect("attn_constraints", Constraint, device=device)
        rules = list(dict.fromkeys(replace(rule, plugin=a.name) for rule in found_rules))
        if str(device) in out:
            before, rules_before = out[str(device)]
            rows = [row for row in before if row in rows]
            rules = list(dict.fromkeys([*rules_before, *rules]))
        out[str(device)] = rows, rules
    return out
