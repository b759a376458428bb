"""Runs in a process of its own: loads plugins, resolves, prints JSON. One job per line on stdin, one answer per line.

A job names folders for ``sys.path``, the environment plugins are chosen by, and devices to imagine or whether to probe.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from attn_core.errors import AttnCoreError
from attn_core.plugins import discover, installed_packages, load_plugins
from attn_core.resolve import resolve
from attn_core.spec import EngineOptions, ModelSpec

STRANGERS = [f.name for f in discover()]
"""Plugins really installed on this machine, found before any job adds its own: left out."""
MODEL = ModelSpec.of(num_heads=14, num_kv_heads=2, head_dim=64, dtype="bfloat16")


def run(job: dict[str, Any]) -> dict[str, Any]:
    environ = job.get("environ", {})
    denied = [*STRANGERS, environ.get("ATTN_CORE_DISABLE_PLUGINS", "")]
    plugins = load_plugins(environ={**environ, "ATTN_CORE_DISABLE_PLUGINS": ",".join(denied)})
    found = plugins.probe(job.get("timeout")) if job.get("probe") else ()
    known = {str(d): d for p in plugins.platforms().values() for d in p.known}
    devices = found or [known[name] for name in job.get("devices", ())]
    decisions, texts, listed = {}, {}, {}
    for device in devices:
        catalog = plugins.catalog(device)
        decision = resolve(device, MODEL, EngineOptions(), catalog, installed_packages(catalog, [device]))
        data = decision.to_json()
        listed[str(device)] = data.pop("plugins")
        decisions[str(device)] = json.dumps(data, sort_keys=True)
        texts[str(device)] = decision.explain()
    return {
        "found": [str(d) for d in found],
        "reports": [r.to_json() for r in plugins.reports],
        "decisions": decisions,
        "listed": listed,
        "explained": texts,
        "platforms": sorted(plugins.platforms()),
    }


def main() -> None:
    logging.disable()
    for line in sys.stdin:
        job = json.loads(line)
        sys.path[:0] = job["path"]
        try:
            answer = run(job)
        except AttnCoreError as e:
            answer = {"raised": type(e).__name__, "text": str(e)}
        except BaseException as e:
            answer = {"fatal": type(e).__name__}
        finally:
            del sys.path[: len(job["path"])]
        answer["torch"] = "torch" in sys.modules
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
