"""One rank of a real gloo group, as a process of its own: ``distributed_rank.py RANK SIZE PORT STEPS``.

``STEPS`` is JSON: what this rank does, in order. Prints one line of JSON per step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from attn_core import AttentionSpec, Decision, MissingKernelError, NoBackendError, get_platform, hookimpl, simulate
from attn_core.fleet import FleetError, about
from attn_core.integrations import distributed
from attn_core.plugins import load_plugins

VERSION = about.version
MODEL = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")


class Extra:
    """A plugin that promises nothing; some ranks have it."""

    @hookimpl
    def attn_backends(self) -> list[Any]:
        return []


def platform(step: dict[str, Any]) -> Any:
    if step["device"] == "here":
        return get_platform("cpu")
    if step["device"] == "broken":
        raise RuntimeError("the driver does not answer")
    plugins = load_plugins(strict=False, extra=[("extra", Extra())] if step.get("extra") else ())
    return simulate(step["device"], with_packages=step.get("packages"), plugins=plugins)


def act(step: dict[str, Any], rank: int) -> dict[str, Any]:
    if step["do"] == "die":
        os._exit(9)
    if step["do"] == "sleep":
        time.sleep(step["seconds"])
        return {}
    about.version = (lambda: step["version"]) if step.get("version") else VERSION
    asks = {
        "timeout": 4.0,
        "roles": step.get("roles"),
        "tolerate": step.get("tolerate", False),
        **step.get("options", {}),
    }
    group = dist.new_group(step["ranks"]) if "ranks" in step else None
    if "ranks" in step and rank not in step["ranks"]:
        return {}
    model = replace(MODEL, **step.get("model", {}))
    start = time.monotonic()
    try:
        if step["do"] == "bind":
            return bound(model, group, step, asks)
        given = platform(step) if step["device"] != "broken" else Broken()
        agreed = distributed.agree(model, group, platform=given, **asks)
    except NoBackendError as e:
        return {"error": type(e).__name__, "code": e.code, "text": e.text, "relaxations": list(e.relaxations),
                "rejections": [r.text for r in e.rejections], "seconds": time.monotonic() - start}  # fmt: skip
    except (FleetError, ValueError) as e:
        return {"error": type(e).__name__, "text": str(e), "ranks": list(getattr(e, "ranks", ())),
                "seconds": time.monotonic() - start}  # fmt: skip
    decision: Decision = agreed.decision
    return {
        "digest": agreed.fleet.digest, "decision": decision.digest, "device": str(decision.device),
        "values": dict(decision.values), "roles": sorted(decision.groups["full"].choices),
        "backends": {r: c.backend for r, c in decision.groups["full"].choices.items()},
        "bytes": hash(agreed.fleet.dumps()) if os.environ.get("PYTHONHASHSEED") == "0" else 0,
        "seconds": time.monotonic() - start,
    }  # fmt: skip


class Broken:
    """A platform whose probe failed."""

    plugins = None

    @property
    def devices(self) -> Any:
        raise RuntimeError("the driver does not answer")


def bound(model: AttentionSpec, group: Any, step: dict[str, Any], asks: dict[str, Any]) -> dict[str, Any]:
    """Bind on this CPU; a rank that ``lacks`` a backend finds out only when it binds."""
    from attn_core.runtime import backend

    real = backend.bind_decision

    def bind(decision: Decision, *args: Any, **kwargs: Any) -> Any:
        for c in (c for g in decision.groups.values() for c in g.choices.values() if c.backend == step.get("lacks")):
            e = MissingKernelError("the library is not there")
            e.backend, e.bind = c.backend, c.bind
            raise e
        return real(decision, *args, **kwargs)

    backend.bind_decision = bind
    try:
        attn = distributed.attention_backend(model, group, platform=platform(step), **asks)
    except FleetError as e:
        return {"error": "FleetError", "text": str(e), "ranks": list(e.ranks)}
    finally:
        backend.bind_decision = real
    (chosen,) = attn.decision.groups.values()
    return {"backends": {r: c.backend for r, c in chosen.choices.items()}, "values": dict(attn.decision.values)}


def main() -> None:
    rank, size, port, steps = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    hosts_store = rank == size - 1  # not the rank that decides, so that either can die by itself
    store = dist.TCPStore("127.0.0.1", port, size, hosts_store, timeout=timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for step in steps:
        print(json.dumps(act(step, rank)), flush=True)
    sys.stdin.read()  # the parent closes it when all are done: whoever hosts the store stays until then
    os._exit(0)  # no farewell to ranks that are dead


if __name__ == "__main__":
    main()
