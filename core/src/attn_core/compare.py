"""Two decisions side by side, and one decision made again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attn_core.catalog import Catalog, Installed
from attn_core.plugins import Plugins
from attn_core.resolve import resolve
from attn_core.spec import Decision

_UNCOMPARED = frozenset({"digest", "rejections", "plugins", "because", "eligible"})


def differences(a: Decision, b: Decision) -> list[str]:
    """What differs in question or answer, one ``path: old -> new`` line each; reasons and reports are left out."""
    return list(_walk("", *({k: v for k, v in d.to_json().items() if k not in _UNCOMPARED} for d in (a, b))))


def _walk(path: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _walk(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
    elif a != b:
        yield f"{path}: {a} -> {b}"


def replay(decision: Decision, plugins: Plugins) -> Decision:
    """The same question asked of the plugins installed now, with the devices and package versions of then.

    Raises as :func:`attn_core.resolve.resolve` does when nothing fits any more.
    """
    catalog: Catalog = plugins.catalog(tuple(decision.devices.values()))
    devices = decision.devices.get("") or decision.devices
    return resolve(devices, decision.model, decision.options, catalog, Installed(versions=decision.versions))
