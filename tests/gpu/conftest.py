"""What ran on a device is written to ``benchmarks/out/ran-<platform>-<arch>.json``; docs/support.md rests on it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from attn_core import get_platform

OUT = Path(__file__).parents[2] / "benchmarks" / "out"


@pytest.fixture(scope="session")
def record():
    """(backend, case) -> what became of it."""
    found: dict[str, dict[str, str]] = {}
    yield found
    platform = get_platform()
    if platform.name == "cpu":
        return
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    asked = {r.name for d in platform.catalog.devices.values() for b in d.backends for r in b.requires}
    about = {
        "device": platform.device.to_json(),
        "versions": {n: v for n, v in sorted(packages.items()) if n in asked or n.startswith(("attn", "torch"))},
        "results": found,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"ran-{platform.name}-{platform.device.arch}.json"
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
