"""A small world of made-up backends for tests of decisions: rows as short as their differences."""

from __future__ import annotations

from typing import Any

from attn_core import ANY, BackendSpec, Constraint, Decision, Device, EngineOptions, ModelSpec, MultipleOf
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.resolve import resolve
from attn_core.spec import PluginReport

CUDA = Device(platform="cuda", arch="sm_90", isa=frozenset({"mma", "wgmma"}), versions={"cuda": "12.4"})
CPU = Device(platform="cpu", arch="avx2", isa=frozenset({"avx2"}))
EVERYTHING = {
    "sinks": True, "sliding_window": True, "logit_softcap": True, "unequal_v": True, "custom_scale": True, "lse": True,
    "attn_type": ANY, "kind": ["mha", "mla"], "graph": ANY, "kv_layout": ["NHD", "HND"], "kv_cache_dtype": ANY,
}  # fmt: skip


def row(name: str, role: str, device: Device = CUDA, **given: Any) -> BackendSpec:
    accepts = {"dtype": ["bfloat16", "float16"], "head_dim": MultipleOf(8, max=256), **given.pop("accepts", {})}
    return BackendSpec(
        backend=name,
        role=role,
        platform=device.platform,
        accepts=accepts,
        plugin=given.pop("plugin", device.platform),
        bind="nowhere:bind",
        **given,
    )


def both(name: str, device: Device = CUDA, **given: Any) -> list[BackendSpec]:
    return [row(name, role, device, **given) for role in ("prefill", "decode")]


def base(device: Device = CUDA) -> list[BackendSpec]:
    """What core always brings: references for every role."""
    accepts = {"dtype": ANY, "head_dim": ANY, **EVERYTHING}
    core: dict[str, Any] = {"platform": device.platform, "plugin": "core", "tier": "REFERENCE"}
    rows = [
        BackendSpec(backend="torch_native", role=role, accepts=accepts, bind="nowhere:bind", **core)
        for role in ("prefill", "decode", "encode")
    ]
    writes = {
        "dtype": ANY,
        "head_dim": ANY,
        "kv_layout": ["NHD", "HND"],
        "kv_cache_dtype": ANY,
        "graph": ANY,
        "unequal_v": True,
    }
    rows.append(BackendSpec(backend="torch_native", role="kv_write", accepts=writes, bind="nowhere:bind", **core))
    rows.append(BackendSpec(backend="unfused", role="allreduce_fusion", accepts={"graph": ANY}, **core))
    for role in ("linear_prefill", "linear_decode"):
        linear = {"kind": ["gdn", "kda", "mamba2"], "graph": ANY}
        rows.append(BackendSpec(backend="engine", role=role, accepts=linear, **{**core, "tier": "PORTABLE"}))
    return rows


def catalog(
    rows: list[BackendSpec],
    rules: tuple[Constraint, ...] = (),
    device: Device = CUDA,
    reports: tuple[PluginReport, ...] = (),
) -> Catalog:
    return Catalog({str(device): DeviceCatalog((*rows, *base(device)), rules)}, reports)


def decide(
    model: Any,
    cat: Catalog,
    device: Any = CUDA,
    installed: Installed | None = None,
    **options: Any,
) -> Decision:
    present = installed if installed is not None else Installed(assume=True)
    return resolve(device, ModelSpec.of(model), EngineOptions.of(**options), cat, present)
