"""The five vendor plugins as their hooks show them, and decisions made with them beside a portable stand-in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from attn_core import ANY, BackendSpec, Decision, Device, EngineOptions, ModelSpec, PlatformSpec
from attn_core import cpu as core_cpu
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.resolve import resolve
from attn_core.spec import Constraint

NAMES = ("cuda", "musa", "rocm", "ascend", "intel")
PLUGINS: dict[str, ModuleType] = {name: importlib.import_module(f"attn_plugin_{name}") for name in NAMES}
PLATFORMS: dict[str, PlatformSpec] = {p.name: p for m in PLUGINS.values() for p in m.attn_platforms()}
MODELS = Path(__file__).parents[2] / "data" / "models"


def device(text: str) -> Device:
    """A known device by ``platform:arch`` or ``platform:product``."""
    platform, _, arch = text.partition(":")
    spec = core_cpu.PLATFORM if platform == "cpu" else PLATFORMS[platform]
    return {d.arch: d for d in spec.known}[spec.aliases.get(arch, arch)]


def known() -> Iterator[tuple[str, Device]]:
    """(plugin, device) for every device that a plugin has rows for."""
    for name, module in PLUGINS.items():
        for p in module.attn_platforms():
            yield from ((name, d) for d in p.known)
    yield from (("intel", d) for d in core_cpu.PLATFORM.known)


def rows(name: str, dev: Device) -> list[BackendSpec]:
    return list(PLUGINS[name].attn_backends(device=dev))


def rules(name: str, dev: Device) -> list[Constraint]:
    hook = getattr(PLUGINS[name], "attn_constraints", None)
    return list(hook(device=dev)) if hook else []


@cache
def _catalog(dev: Device) -> Catalog:
    found: list[BackendSpec] = []
    limits: list[Constraint] = []
    for name in NAMES:
        found += [replace(r, plugin=name) for r in rows(name, dev)]
        limits += [replace(c, plugin=name) for c in rules(name, dev)]
    return Catalog({str(dev): DeviceCatalog((*found, *_core(dev.platform)), tuple(limits))})


def _core(platform: str) -> Iterator[BackendSpec]:
    """What core brings, as far as these tests care: Triton that can do anything, and the accompanying roles."""
    everything = {
        "dtype": ANY, "head_dim": ANY, "attn_type": ANY, "unequal_v": True, "custom_scale": True, "lse": True,
        "sliding_window": ANY, "attention_chunk": ANY, "logit_softcap": ANY, "sinks": True, "alibi": True,
        "bias": True, "bidirectional_prefix": True, "deterministic": True, "verify_width": ANY, "tree_mask": True,
        "host_lengths": ANY, "graph": ANY, "kv_cache_dtype": ANY,
    }  # fmt: skip
    core: dict[str, Any] = {"platform": platform, "plugin": "core", "evidence": "a stand-in"}
    for role in ("encode", "prefill", "decode"):
        cached = {} if role == "encode" else {"kv_layout": ["NHD", "HND"]}
        yield BackendSpec(backend="triton", role=role, tier="PORTABLE", accepts={**everything, **cached}, **core)
    for role, form in (("prefill", "materialised"), ("decode", "absorbed")):
        latent = {**everything, "kind": "mla", "sparse": ANY, "kv_layout": ["MLA"]}
        yield BackendSpec(backend="triton", role=role, form=form, tier="PORTABLE", accepts=latent, **core)
    for form, layouts in ((None, ["NHD", "HND"]), ("absorbed", ["MLA", "MLA_SPLIT"])):
        writes = {
            "dtype": ANY, "head_dim": ANY, "unequal_v": True, "graph": ANY, "kv_cache_dtype": ANY, "kv_layout": layouts,
            "kind": "mla" if form else "mha", "mla_query": ["packed", "split"],
        }  # fmt: skip
        yield BackendSpec(backend="torch_native", role="kv_write", form=form, tier="REFERENCE", accepts=writes, **core)
    for role in ("linear_prefill", "linear_decode"):
        linear = {"kind": ["gdn", "kda", "mamba2"], "graph": ANY}
        yield BackendSpec(backend="engine", role=role, tier="PORTABLE", accepts=linear, **core)
    unfused = {"graph": ANY, "deterministic": True}
    yield BackendSpec(backend="unfused", role="allreduce_fusion", tier="REFERENCE", accepts=unfused, **core)


def decide(
    model: str | dict[str, Any],
    where: str,
    *,
    without: tuple[str, ...] = (),
    versions: dict[str, str] | None = None,
    **options: Any,
) -> Decision:
    """``model``: a file in tests/data/models, or the fields of an AttentionSpec. ``versions``: of other toolkits."""
    dev = device(where)
    spec = ModelSpec.from_hf_config(MODELS / f"{model}.json") if isinstance(model, str) else ModelSpec.of(**model)
    installed = Installed(versions={**dev.versions, **(versions or {})}, assume=True, without=frozenset(without))
    return resolve(dev, spec, EngineOptions.of(**options), _catalog(dev), installed)


def chosen(decision: Decision, group: str = "full") -> tuple[str, ...]:
    """Backends of the attention roles of one group: (encode,) or (prefill, decode)."""
    choices = decision.groups[group].choices
    return tuple(choices[r].backend for r in ("encode", "prefill", "decode") if r in choices)
