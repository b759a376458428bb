"""Everything the installed plugins declared for the devices at hand: the resolver's view of the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from packaging.version import Version

from attn_core.domain import Value
from attn_core.spec import BackendSpec, Constraint, PluginReport, Requirement
from attn_core.spec.backend import canonical, mentioned
from attn_core.spec.fields import SHARED

if TYPE_CHECKING:
    from attn_core.resolve.judge import Row


@dataclass(frozen=True)
class DeviceCatalog:
    """Declarations for one device, stamped with their plugin and in an order made of content only."""

    backends: tuple[BackendSpec, ...]
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", tuple(sorted(self.backends, key=lambda b: b.content)))
        object.__setattr__(self, "constraints", tuple(sorted(self.constraints, key=lambda c: c.content)))

    @cached_property
    def rows(self) -> Mapping[str, tuple[Row, ...]]:
        """Backends by role, prepared for judging."""
        from attn_core.resolve.judge import Row

        out: dict[str, list[Row]] = {}
        seen: dict[tuple[str, str, str], int] = {}
        for i, b in enumerate(self.backends):
            who = (b.plugin, b.backend, b.role)
            seen[who] = number = seen.get(who, -1) + 1
            out.setdefault(b.role, []).append(Row(b, i, number))
        return {role: tuple(rows) for role, rows in out.items()}

    @cached_property
    def named_values(self) -> Mapping[str, frozenset[Value]]:
        """Values of the shared fields that some row or constraint names: what the finite universe must contain."""
        sides = [b.accepts for b in self.backends] + [s for c in self.constraints for s in (c.when, c.then)]
        return {n: frozenset(mentioned(s[n] for s in sides if n in s)) for n in SHARED}

    @cached_property
    def requirements(self) -> tuple[tuple[str, Requirement], ...]:
        """Every (plugin, requirement) of some row, each once, in content order."""
        return tuple(
            dict.fromkeys((b.plugin, r) for b in self.backends for r in b.requires if isinstance(r, Requirement))
        )

    @cached_property
    def written_for(self) -> Mapping[str, Mapping[str, str]]:
        """Plugin -> package -> the newest version one of its rows was written for: what a what-if assumes for it."""
        out: dict[str, dict[str, str]] = {}
        for plugin, r in self.requirements:
            if r.written_for:
                mine = out.setdefault(plugin, {})
                mine[r.name] = max(mine.get(r.name, r.written_for), r.written_for, key=Version)
        return out


@dataclass(frozen=True)
class Catalog:
    """Device -> declarations, and how every plugin fared."""

    devices: Mapping[str, DeviceCatalog]
    """Keyed by ``str(device)``."""
    reports: tuple[PluginReport, ...] = ()


@dataclass(frozen=True)
class Installed:
    """Which packages and toolkits count as present. Immutable input of the resolver.

    ``versions`` maps canonical names to versions. A package missing there is absent, unless ``assume`` is set: then
    every package a plugin knows counts as installed at the version it was written for, except those in ``without``.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    assume: bool = False
    without: frozenset[str] = frozenset()
    impostors: Mapping[str, str] = field(default_factory=dict)
    """Installed packages that are not the vendor's: name -> which of its symbols are missing."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Symbols that an installed package of the vendor's was built without: symbol -> what it is missing from."""
    unusable: Mapping[str, str] = field(default_factory=dict)
    """Rows' ``bind`` that turned out to miss their kernel: ``module:function`` -> why."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", {canonical(k): v for k, v in self.versions.items()})
        object.__setattr__(self, "without", frozenset(map(canonical, self.without)))

    def version(self, requirement: Requirement, written_for: Mapping[str, str]) -> str | None:
        """The version that counts for a requirement, None when absent, ``""`` when present and unknown."""
        name = requirement.name
        if name in self.without or name in self.impostors or (self.lacking and self.objection(requirement)):
            return None
        found = self.versions.get(name)
        if found is None and self.assume:
            return written_for.get(name, "")
        return found

    def objection(self, requirement: Requirement) -> str:
        """Why the installed package does not count for a requirement; empty when it does, or there is none."""
        texts = (self.lacking[s] for s in requirement.symbols if s in self.lacking)
        return self.impostors.get(requirement.name) or next(texts, "")
