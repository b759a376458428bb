"""Runs in a process of its own: loads and asks every plugin under an audit hook, prints what they touched."""

from __future__ import annotations

import json
import sys
from typing import Any

touched: list[str] = []


def audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "import":
        touched.append(f"import {args[0].partition('.')[0]}")
    elif event == "ctypes.dlopen":
        touched.append(f"dlopen {args[0]}")
    elif event == "subprocess.Popen":
        touched.append("child")
    elif event == "open" and str(args[0]).startswith("/dev/"):
        touched.append(f"device {args[0]}")


def main() -> None:
    import attn_core  # noqa: F401
    from attn_core.plugins import installed_packages, load_plugins

    plugins = load_plugins(environ={})
    for device in [d for p in plugins.platforms().values() for d in p.known]:
        installed_packages(plugins.catalog(device), [device])
    asked = sorted(set(touched))
    touched.clear()
    found = plugins.probe()
    print(
        json.dumps(
            {
                "asked": asked,
                "probed": sorted(t for t in touched if not t.startswith("import ")),
                "modules": sorted(m for m in sys.modules if "." not in m),
                "plugins": {r.name: f"{r.status} {r.error or ''}".strip() for r in plugins.reports},
                "devices": [str(d) for d in found],
            }
        )
    )


if __name__ == "__main__":
    sys.addaudithook(audit)
    main()
