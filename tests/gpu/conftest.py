"""What ran on a device is written to ``benchmarks/out/ran-<platform>-<arch>.json``; a copy in
``docs/hardware``, without the refusals, makes ``docs/support.md`` say so.

Verdicts travel in the reports, so that workers of pytest-xdist add to one record.
"""

from __future__ import annotations

import json
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from attn_core import get_platform

OUT = Path(__file__).parents[2] / "benchmarks" / "out"
FOUND: dict[str, dict[str, Any]] = {}
"""backend -> case -> what was asked, what became of it, and through which bind functions."""


def pytest_runtest_logreport(report):
    if report.when != "teardown":
        return
    for name, value in report.user_properties:
        if name == "ran":
            backend, case, told = value
            FOUND.setdefault(backend, {})[case] = told


def pytest_sessionfinish(session):
    platform = get_platform()
    if platform.name == "cpu" or not FOUND or hasattr(session.config, "workerinput"):
        return
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    asked = {r.name for d in platform.catalog.devices.values() for b in d.backends for r in b.requires}
    about = {
        "date": date.today().isoformat(),
        "device": platform.device.to_json(),
        "versions": {n: v for n, v in sorted(packages.items()) if n in asked or n.startswith(("attn", "torch"))},
        "results": {backend: dict(sorted(cases.items())) for backend, cases in sorted(FOUND.items())},
    }
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"ran-{platform.name}-{platform.device.arch}.json"
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
