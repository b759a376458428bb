"""What one rank says of itself: device, plugins, packages and the question it was asked. JSON, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

from attn_core.catalog import DeviceCatalog, Installed
from attn_core.errors import AttnCoreError
from attn_core.platform import Platform, get_platform
from attn_core.spec import Device, EngineOptions, ModelSpec
from attn_core.spec.decision import canonical_json

WIRE = 1
"""Version of what ranks send each other."""


class FleetError(AttnCoreError):
    """Ranks cannot agree: one failed, is missing, or differs in what must be equal. ``ranks`` holds which."""

    def __init__(self, text: str, ranks: Collection[int] = ()) -> None:
        super().__init__(text)
        self.ranks = tuple(ranks)


def version() -> str:
    try:
        return metadata.version("attn-core")
    except metadata.PackageNotFoundError:
        return ""


def describe(
    model: Any,
    *,
    platform: Platform | None = None,
    device: int = 0,
    roles: Collection[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """This rank, as JSON: a few kilobytes, equal text for equal ranks.

    ``model`` and ``options`` are those of :meth:`Platform.resolve`; they are not sent, only a digest that tells whether
    all ranks ask the same. ``roles``: what this rank runs of ``prefill``, ``decode``, ``encode``; None for everything.
    """
    platform = platform or get_platform()
    mine = replace(platform.devices[device], index=0)  # where a device sits is no part of what it is
    declared = platform.catalog.devices[str(mine)]
    return {
        "wire": WIRE,
        "attn_core": version(),
        "asks": question_digest(ModelSpec.of(model), EngineOptions.of(**options)),
        "device": mine.to_json(),
        "roles": None if roles is None else sorted(roles),
        "plugins": {
            r.name: {
                "dist": r.dist, "version": r.version, "works": r.status in ("ok", "absent"), "status": r.status,
                "error": r.error, "declares": declares(declared, r.name),
            }
            for r in platform.catalog.reports
        },
        "packages": packages(declared, platform.installed),
        "impostors": dict(platform.installed.impostors),
        "lacking": dict(platform.installed.lacking),
        "unusable": dict(platform.installed.unusable),
        "error": None,
    }  # fmt: skip


def failure(error: BaseException) -> dict[str, Any]:
    """What a rank sends that could not describe itself: the others learn why instead of waiting."""
    return {"wire": WIRE, "attn_core": version(), "error": f"{type(error).__name__}: {error}"}


def question_digest(model: ModelSpec, options: EngineOptions) -> str:
    return _digest(canonical_json({"model": model.to_json(), "options": options.to_json()}))


def declares(declared: DeviceCatalog, plugin: str) -> str:
    """Digest of everything one plugin promises for a device: the same version may be installed from other sources."""
    rows = [(b.content, int(b.tier), b.rank) for b in declared.backends if b.plugin == plugin]
    rules = [c.content for c in declared.constraints if c.plugin == plugin]
    return _digest(repr((rows, rules)))


def packages(declared: DeviceCatalog, installed: Installed) -> dict[str, str]:
    """Every package and toolkit that some row asks for, with the version that counts; absent ones are left out."""
    out: dict[str, str] = {}
    for plugin, requirement in declared.requirements:
        found = installed.version(requirement, declared.written_for.get(plugin, {}))
        if found is not None:
            out.setdefault(requirement.name, found)
    return dict(sorted(out.items()))


def installed_of(said: Mapping[str, Any]) -> Installed:
    return Installed(
        versions=said["packages"], impostors=said["impostors"], lacking=said["lacking"], unusable=said["unusable"]
    )


def device_of(said: Mapping[str, Any]) -> Device:
    return Device.from_json(said["device"])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
