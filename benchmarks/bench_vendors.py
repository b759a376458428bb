"""Every model under test on every device that the plugins describe: what one decision costs on average."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from harness import Result, result

from attn_core import ModelSpec, simulate
from attn_core.errors import NoBackendError
from attn_core.platform import installed_plugins

MODELS = sorted((Path(__file__).parents[1] / "tests" / "data" / "models").glob("*.json"))


def deciding() -> Iterator[Result]:
    models = [ModelSpec.from_hf_config(path) for path in MODELS]
    devices = [str(d) for p in installed_plugins().platforms().values() for d in p.known]
    platforms = [simulate(device) for device in devices]
    samples, refused = [], 0
    for _ in range(6):
        refused, start = 0, time.process_time()
        for platform in platforms:
            for model in models:
                refused += 1
                with suppress(NoBackendError):
                    platform.resolve(model)
                    refused -= 1
        samples.append((time.process_time() - start) / (len(platforms) * len(models)) * 1e3)
    note = f"{len(models)} models x {len(devices)} devices, all plugins; {refused} refusals among them"
    yield result("a decision, every model on every known device", samples[1:], "ms CPU", limit=1.5, note=note)


ALL = (deciding,)
