"""Which plugins are installed: entry points of every contract version, read from metadata alone. Imports nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import metadata

from attn_core.hookspecs import API_MAJOR, GROUP_PREFIX
from attn_core.spec.backend import canonical

_log = logging.getLogger("attn_core")


@dataclass(frozen=True, kw_only=True, order=True)
class Found:
    """One entry point: a plugin's name, the distribution that claims it, and where its module is."""

    name: str
    dist: str
    version: str
    api: str
    """Version of the contract it was written for: the text after ``attn_core.v`` in the group's name."""
    reference: str
    """``module`` or ``module:object``."""

    @property
    def compatible(self) -> bool:
        return self.api == str(API_MAJOR)

    @property
    def source(self) -> str:
        """Distribution and version as a person names them."""
        return f"{self.dist} {self.version}".strip() or "in-process"


def discover() -> tuple[Found, ...]:
    """Entry points of the groups ``attn_core.v*``, sorted, read in one pass over ``sys.path``.

    A distribution found twice counts once, the first on the path: that is the one an import would get. Unreadable
    metadata of strangers is skipped; it cannot be a reason to fail here.
    """
    found: set[Found] = set()
    seen: set[str] = set()
    for dist in metadata.distributions():
        try:
            if GROUP_PREFIX not in (dist.read_text("entry_points.txt") or ""):
                continue
            entries = [ep for ep in dist.entry_points if ep.group.startswith(GROUP_PREFIX)]
        except Exception as e:
            _log.debug("entry points of %r cannot be read: %s: %s", dist, type(e).__name__, e)
            continue
        name, version = _identity(dist)
        if canonical(name) in seen:
            continue
        if name != _UNNAMED:
            seen.add(canonical(name))
        for ep in entries:
            api = ep.group.removeprefix(GROUP_PREFIX)
            found.add(Found(name=ep.name, dist=name, version=version, api=api, reference=ep.value))
    return tuple(sorted(found))


def _identity(dist: metadata.Distribution) -> tuple[str, str]:
    """Name and version; a plugin whose distribution lost its metadata is still a plugin."""
    try:
        fields = dist.metadata
        name, version = (fields[key] if key in fields else "" for key in ("Name", "Version"))  # noqa: SIM401 - .get is not in its protocol
        return str(name or _UNNAMED), str(version or "")
    except Exception:
        return _UNNAMED, ""


_UNNAMED = "unnamed"
