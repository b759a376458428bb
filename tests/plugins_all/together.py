"""The five vendor plugins as users have them: each alone beside core, and all of them in one environment."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attn_core import Device, ModelSpec, NoBackendError
from attn_core.platform import Platform
from attn_core.plugins import Plugins, load_plugins

NAMES = ("ascend", "cuda", "intel", "musa", "rocm")
PATHS = sorted((Path(__file__).parents[1] / "data" / "models").glob("*.json"))
MODELS = {path.stem: ModelSpec.from_hf_config(path) for path in PATHS}


def plugins(*names: str, more: Iterable[tuple[str, Any]] = ()) -> Plugins:
    """Core and these, as if no other were installed. ``more``: objects with hooks, by name."""
    extra = [*((name, importlib.import_module(f"attn_plugin_{name}")) for name in names), *more]
    return load_plugins(extra=extra, discovery=False, strict=True, environ={})


ALONE = {name: plugins(name) for name in NAMES}


def devices() -> Iterator[tuple[str, Device]]:
    """(plugin, device) for every known device a plugin speaks about; the CPUs of core are intel's."""
    for name, alone in ALONE.items():
        for platform in alone.platforms().values():
            if platform.name != "cpu" or name == "intel":
                yield from ((name, d) for d in platform.known)


def answer(platform: Platform, model: ModelSpec, **options: Any) -> dict[str, Any]:
    """All that a user sees of one question: the decision or the refusal, in text and as data."""
    try:
        decision = platform.resolve(model, **options)
    except NoBackendError as e:
        return {"code": e.code, "text": e.text, "rejections": shown(e.rejections), "ways out": e.relaxations}
    return {**decision.to_json(), "text": decision.explain()}


def shown(rejections: Iterable[Any]) -> list[dict[str, Any]]:
    return [r.to_json() for r in rejections]
