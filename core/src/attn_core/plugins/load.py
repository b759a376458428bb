"""From entry points to working plugins: choose by name, load, register, read platforms. Every step is contained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import Any

from attn_core.errors import BadInputError
from attn_core.hookspecs import API_MAJOR, GROUP, GROUP_PREFIX
from attn_core.plugins.discover import Found, discover
from attn_core.plugins.guard import ContainedError, Hooks, load
from attn_core.plugins.registry import Active, Plugins, failed
from attn_core.spec import PlatformSpec, PluginReport
from attn_core.spec.check import nearest

CORE = "core"
ALLOW, DENY, STRICT = "ATTN_CORE_PLUGINS", "ATTN_CORE_DISABLE_PLUGINS", "ATTN_CORE_STRICT"


def load_plugins(
    *,
    allow: Iterable[str] | None = None,
    deny: Iterable[str] | None = None,
    strict: bool | None = None,
    environ: Mapping[str, str] = os.environ,
    extra: Iterable[tuple[str, Any]] = (),
    discovery: bool = True,
) -> Plugins:
    """Find, choose, import and register every installed plugin; core's own is always there.

    ``allow`` and ``deny`` default to the comma-separated names in ``ATTN_CORE_PLUGINS`` and
    ``ATTN_CORE_DISABLE_PLUGINS`` (unset or empty: no restriction; deny wins) and act before import. ``strict`` defaults
    to ``ATTN_CORE_STRICT``: then a failed or incompatible plugin is a :class:`PluginError`, now or when it fails later.
    A plugin that the allow list names must work, strict or not; ``strict=False`` only reports, whatever is set.
    ``extra`` adds plugins without an entry point, ``discovery=False`` leaves out those that have one.

    Raises :class:`BadInputError` for an allow list that names something not installed.
    """
    named = _names(allow, environ.get(ALLOW))
    denied = _names(deny, environ.get(DENY)) or frozenset()
    found = [(f, None) for f in discover()] if discovery else []
    found += [(_in_process(name, plugin), plugin) for name, plugin in extra]
    _check_names(named, denied, [f for f, _ in found])

    chosen, reports = _choose(found, named, denied)
    loaded: list[tuple[Found, Active]] = []
    for f, plugin in [(_core(), None), *chosen]:
        try:
            loaded.append((f, _activate(f, plugin)))
        except ContainedError as e:
            reports.append(failed(_report(f), e))

    claims = _claims({a.name: a.platforms for _, a in loaded})
    active: list[Active] = []
    for f, a in loaded:
        clash = next((claims[p.name][a.name] for p in a.platforms if a.name in claims[p.name]), None)
        reports.append(failed(_report(f), clash) if clash else _report(f))
        if clash is None:
            active.append(a)

    must_work = frozenset() if strict is False or named is None else named
    strict = _flag(environ) if strict is None else strict
    plugins = Plugins(active, reports, strict=strict, must_work=must_work)
    plugins.enforce(plugins.reports)
    return plugins


def _names(given: Iterable[str] | None, text: str | None) -> frozenset[str] | None:
    """Names of an argument or of the environment; None when neither says anything."""
    parts = list(given) if given is not None else [p.strip() for p in (text or "").split(",")]
    names = frozenset(p for p in parts if p)
    return names if names or given is not None else None


def _flag(environ: Mapping[str, str]) -> bool:
    text = environ.get(STRICT, "").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("", "0", "false", "no", "off"):
        return False
    raise BadInputError(f"{STRICT}={text!r} is neither 1 nor 0")


def _check_names(named: frozenset[str] | None, denied: frozenset[str], found: Sequence[Found]) -> None:
    installed = {CORE, *(f.name for f in found)}
    for name in sorted((named or frozenset()) - installed):
        raise BadInputError(
            f"{ALLOW} names plugin {name!r}, which is not installed{nearest(name, installed)}; "
            f"installed are {', '.join(sorted(installed))}"
        )
    if CORE in denied:
        raise BadInputError(f"{DENY} names {CORE!r}, which is attn-core itself and cannot be left out")


def _core() -> Found:
    try:
        version = metadata.version("attn-core")
    except metadata.PackageNotFoundError:
        version = ""
    return Found(name=CORE, dist="attn-core", version=version, api=str(API_MAJOR), reference="attn_core.builtin")


def _in_process(name: str, plugin: Any) -> Found:
    reference = str(getattr(plugin, "__name__", type(plugin).__name__))
    return Found(name=name, dist="", version="", api=str(API_MAJOR), reference=reference)


def _activate(f: Found, plugin: Any) -> Active:
    hooks = Hooks(load(f.reference) if plugin is None else plugin)
    platforms = tuple(hooks.collect("attn_platforms", PlatformSpec))
    # Core's probe reads a file or two and is trusted: the CPU is found even where no child process can be started.
    elsewhere = f.name != CORE if plugin is None else _importable(plugin)
    return Active(name=f.name, hooks=hooks, platforms=platforms, reference=f.reference if elsewhere else None)


def _importable(plugin: Any) -> bool:
    """Whether another process gets this very plugin by importing its name."""
    known = isinstance(plugin, ModuleType) and sys.modules.get(plugin.__name__) is plugin
    return known and getattr(plugin, "__spec__", None) is not None


def _report(f: Found, **changes: Any) -> PluginReport:
    return replace(PluginReport(name=f.name, dist=f.dist, version=f.version), **changes)


def _choose(
    found: Sequence[tuple[Found, Any]], named: frozenset[str] | None, denied: frozenset[str]
) -> tuple[list[tuple[Found, Any]], list[PluginReport]]:
    """Which entry points to import, and a report for each that is not. Nothing is imported here."""
    chosen: list[tuple[Found, Any]] = []
    reports: list[PluginReport] = []
    offered = {(f.dist, f.name) for f, _ in found if f.compatible}
    claims: dict[str, list[Found]] = {}
    for f, _ in found:
        if f.compatible:
            claims.setdefault(f.name, []).append(f)
    for f, plugin in found:
        rivals = [g.source for g in claims.get(f.name, ()) if g != f]
        if f.name in denied:
            reports.append(_report(f, status="blocked", hint=f"named in {DENY}"))
        elif named is not None and f.name not in named:
            reports.append(_report(f, status="blocked", hint=f"not named in {ALLOW}"))
        elif not f.compatible:
            if (f.dist, f.name) not in offered:  # a distribution may serve several contracts at once
                reports.append(_incompatible(f))
        elif f.name == CORE:
            e = ContainedError(f"{f.source} claims the name {CORE!r}, which is attn-core's own", f"uninstall {f.dist}")
            reports.append(failed(_report(f), e))
        elif rivals:
            e = ContainedError(
                f"{' and '.join(sorted([f.source, *rivals]))} both claim the plugin name {f.name!r}; neither is loaded",
                f"uninstall all but one of {', '.join(sorted({g.dist for g in claims[f.name]}))}",
            )
            reports.append(failed(_report(f), e))
        else:
            chosen.append((f, plugin))
    return chosen, reports


def _incompatible(f: Found) -> PluginReport:
    newer = f.api.isdigit() and int(f.api) > API_MAJOR
    return _report(
        f,
        status="incompatible",
        error=f"written for contract {GROUP_PREFIX}{f.api}, this attn-core speaks {GROUP}; not imported",
        hint="upgrade attn-core" if newer else f"upgrade {f.dist}",
    )


def _claims(platforms: Mapping[str, Sequence[PlatformSpec]]) -> Mapping[str, Mapping[str, ContainedError]]:
    """Platform -> plugins that may not have it, with the reason. Judged on all claims at once, so order is nothing.

    Core keeps its own; else the plugin named like the platform keeps it; else nobody does.
    """
    claimants: dict[str, list[str]] = {}
    for plugin, specs in platforms.items():
        for p in specs:
            claimants.setdefault(p.name, []).append(plugin)
    out: dict[str, dict[str, ContainedError]] = {}
    for platform, names in claimants.items():
        owner = names[0] if len(names) == 1 else next((n for n in (CORE, platform) if n in names), None)
        out[platform] = {}
        for n in set(names) - {owner} | {n for n in names if names.count(n) > 1}:
            others = sorted(set(names) - {n})
            who = f"so does {' and '.join(others)}" if others else "twice"
            kept = f"; {owner} keeps it" if owner else ""
            hint = "a plugin that only adds backends to a platform leaves attn_platforms out"
            out[platform][n] = ContainedError(f"attn_platforms: claims platform {platform!r}, {who}{kept}", hint)
    return out
