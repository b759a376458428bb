"""Builds tiny real distributions: a module, a dist-info folder, an entry point. As pip would leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

from attn_core.plugins import discover

HEAD = """
from attn_core.hookspecs import hookimpl
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec, Requirement

def row(device, backend, role, **fields):
    fields = {"accepts": {"dtype": ["bfloat16", "float16", "float32"], "head_dim": [64, 128]}, **fields}
    return BackendSpec(backend=backend, role=role, platform=device.platform, tier="TUNED", **fields)
"""
"""First lines of plugin modules made here."""


def distribution(
    site: Path,
    dist: str,
    plugins: Mapping[str, str] | None = None,
    *,
    group: str = "attn_core.v1",
    version: str = "1.0",
    modules: Mapping[str, str] | None = None,
) -> None:
    """Install ``dist`` into ``site``: entry points ``plugins`` (name -> reference) and source files ``modules``."""
    info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    lines = [f"[{group}]", *(f"{name} = {reference}" for name, reference in (plugins or {}).items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, source in (modules or {}).items():
        path = site / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))


def plugin(site: Path, name: str, source: str, *, head: str = HEAD, **kwargs: str) -> None:
    """A distribution ``acme-<name>`` whose one plugin ``name`` is module ``acme_<name>`` with ``source`` in it."""
    module = f"acme_{name}"
    distribution(site, f"acme-{name}", {name: module}, modules={module: head + dedent(source)}, **kwargs)


def strangers() -> list[str]:
    """Names of plugins really installed on this machine: tests that count plugins or devices leave them out."""
    return sorted({f.name for f in discover() if not f.dist.startswith("acme-")})
