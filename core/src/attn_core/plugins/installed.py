"""Which of the packages that rows require are really here, at which version, and whether they are the right ones.

Nothing is imported: a package is looked up by its metadata, and proven by the files its symbols would come from.
``importlib.util.find_spec("a.b")`` would import ``a``, so submodules are searched along the parent's path instead.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder

from packaging.version import InvalidVersion, Version

from attn_core.catalog import Catalog, Installed
from attn_core.spec import Device, Requirement
from attn_core.spec.backend import canonical


def installed_packages(catalog: Catalog, devices: Iterable[Device] = ()) -> Installed:
    """Versions of every package the catalog's rows require, and of the devices' toolkits, which go first.

    A package whose metadata is missing but whose symbols are found (built from source) is present at the unknown
    version ``""``. One that is installed but proves none of the requirements on it by its symbols is an impostor:
    package indexes have strangers of the same name. One that proves some is the vendor's, built without the rest: vLLM
    has a file per FlashAttention, and not every build has all. Of two devices' toolkits the older counts.
    """
    wanted: dict[str, list[tuple[str, ...]]] = {}
    for d in catalog.devices.values():
        for b in d.backends:
            for r in b.requires:
                if isinstance(r, Requirement):
                    wanted.setdefault(r.name, []).append(r.symbols)
    path = tuple(p for p in sys.path if isinstance(p, str))
    versions: dict[str, str] = {}
    impostors: dict[str, str] = {}
    lacking: dict[str, str] = {}
    for name, proofs in wanted.items():
        version = _version(name, path)
        missing = [
            [s for s in symbols if s not in sys.modules and not module_found(s, path)] for symbols in proofs if symbols
        ]
        proven = not all(missing)
        if version is None and not proven:
            continue
        versions[name] = version or ""
        symbols = sorted({s for m in missing for s in m})
        here = f"the installed {name} {version or ''}".rstrip()
        if missing and not proven:
            impostors[name] = f"{here} is another package or a broken one: it lacks {', '.join(symbols)}"
        else:
            lacking.update((s, f"{here} was built without {s}") for s in symbols)
    toolkits: dict[str, str] = {}
    for device in devices:
        for name, version in device.versions.items():
            both = filter(None, (toolkits.get(canonical(name)), _readable(version)))
            toolkits[canonical(name)] = min(both, key=Version, default="")
    strangers = {name: text for name, text in impostors.items() if name not in toolkits}
    return Installed(versions={**versions, **toolkits}, impostors=strangers, lacking=lacking)


def _readable(version: str | None) -> str:
    """A version that ranges can be compared with, ``""`` for one that cannot be read."""
    try:
        Version(version or "")
    except InvalidVersion:
        return ""
    return version or ""


@cache
def _version(name: str, path: tuple[str, ...]) -> str | None:
    """Installed version, ``""`` when unreadable, None when absent; kept per search path."""
    try:
        return _readable(metadata.distribution(name).version)
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # broken metadata: there, but nobody knows what
        return ""


@cache
def module_found(symbol: str, path: tuple[str, ...]) -> bool:
    """Whether a module has a file, found without importing it or its parents; kept per search path.

    A bare directory of that name (a namespace package, often just a folder beside the script) proves nothing.
    """
    parts = symbol.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except Exception:  # other people's import hooks
        spec = None
    for i in range(1, len(parts)):
        if spec is None:
            return False
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), list(spec.submodule_search_locations or ()))
    return spec is not None and spec.origin is not None
