"""Random questions for the resolver: several groups, all roles, pins, constraints, per-group values, two devices."""

from __future__ import annotations

import random
from typing import Any

from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.domain import ANY, MultipleOf, NoneOf, OneOf
from attn_core.spec import AttentionSpec, BackendSpec, Constraint, Device, EngineOptions, LinearSpec, ModelSpec

ALPHA = Device(platform="alpha", arch="a1", isa=frozenset({"x", "y"}))
BETA = Device(platform="beta", arch="b1", isa=frozenset({"x", "z"}))
NAMES = ("n1", "n2", "n3", "n4")


def group(r: random.Random, kind: str) -> Any:
    if kind == "linear":
        return LinearSpec(kind="gdn", num_heads=8, head_dim=64, dtype="bfloat16")
    if kind == "encoder":
        return AttentionSpec(num_heads=12, head_dim=32, dtype="float16", attn_type="encoder_only")
    kv = r.choice([2, 4, 8])
    return AttentionSpec(
        num_heads=kv * r.choice([1, 4]),
        num_kv_heads=kv,
        head_dim=r.choice([32, 64, 128]),
        dtype=r.choice(["bfloat16"] * 4 + ["float16"]),
        sinks=r.random() < 0.3,
        sliding_window=r.choice([None, None, 128]),
    )


def row(r: random.Random, role: str, device: Device, plugin: str) -> BackendSpec:
    linear = role.startswith("linear")
    accepts: dict[str, Any] = {
        "dtype": r.choice([ANY, ANY, OneOf("bfloat16", "float16"), OneOf("bfloat16")]),
        "head_dim": r.choice([ANY, ANY, OneOf(64, 128), OneOf(128, 64, 32), MultipleOf(64)])
        if role != "kv_write"
        else ANY,
    }
    if role == "encode":
        accepts["attn_type"] = ANY
    if linear:
        accepts["kind"] = OneOf("gdn")
    if role in ("prefill", "decode"):
        if r.random() < 0.85:
            accepts["sinks"] = True
        if r.random() < 0.9:
            accepts["sliding_window"] = True
        if r.random() < 0.2:
            accepts["group_size"] = r.choice([OneOf(1), NoneOf(1), MultipleOf(1, max=4)])
        if r.random() < 0.2:
            accepts["kv_offload_io"] = NoneOf("kernel")
    if role in ("prefill", "decode", "kv_write"):
        if r.random() < 0.5:
            accepts["page_size"] = r.choice(
                [OneOf(64), OneOf(32, 16), *[MultipleOf(16)] * 3, MultipleOf(24), OneOf(1), NoneOf(1), OneOf(128, 64)]
            )
        if r.random() < 0.6:
            accepts["kv_cache_dtype"] = r.choice(
                [OneOf("auto", "fp8_e4m3"), OneOf("fp8_e4m3"), OneOf("bfloat16"), ANY, ANY]
            )
        if r.random() < 0.6:
            accepts["kv_layout"] = r.choice(
                [OneOf("HND"), *[OneOf("HND", "NHD")] * 3, OneOf("NHD"), OneOf("NHD", "PRIVATE"), ANY]
            )
    if r.random() < 0.6:
        accepts["graph"] = r.choice([OneOf("full", "none"), OneOf("none"), ANY, ANY, OneOf("decode", "piecewise")])
    if role == "allreduce_fusion":
        accepts = {"graph": accepts.get("graph", ANY)}
        if r.random() < 0.5:
            accepts["world_size"] = NoneOf(1)
    return BackendSpec(
        backend=r.choice(NAMES),
        role=role,
        platform=device.platform,
        tier=r.randrange(4),
        rank=r.randrange(3),
        accepts=accepts,
        needs=frozenset(r.choice([(), (), (), ("x",), ("y",), ("z",)])),
        requires=r.choice([(), (), (), (), ("pkg>=1.2",), ("pkg>=2",), ("gone",)]),
        pads=frozenset({"head_dim"} if role in ("prefill", "decode", "encode") and r.random() < 0.4 else ()),
        plugin=plugin,
        evidence=str(r.randrange(3)),
    )


def permissive(role: str, device: Device, plugin: str, tier: int) -> BackendSpec:
    """A row that takes nearly everything, so that most questions have an answer."""
    accepts: dict[str, Any] = {"dtype": ANY, "head_dim": ANY, "graph": ANY}
    if role.startswith("linear"):
        accepts["kind"] = OneOf("gdn")
    else:
        accepts |= {
            "sinks": True,
            "sliding_window": True,
            "attn_type": ANY,
            "kv_cache_dtype": ANY,
            "kv_layout": OneOf("NHD", "HND"),
        }
    return BackendSpec(backend="any", role=role, platform=device.platform, tier=tier, accepts=accepts, plugin=plugin)


def constraint(r: random.Random, i: int, plugin: str) -> Constraint:
    side = lambda: r.choice(  # noqa: E731
        [
            {"prefill": OneOf(r.choice(NAMES))},
            {"decode": OneOf(*r.sample(NAMES, 2))},
            {"kv_write": NoneOf(r.choice(NAMES))},
            {"page_size": r.choice([OneOf(64), MultipleOf(32)])},
            {"kv_cache_dtype": OneOf("fp8_e4m3")},
            {"kv_layout": OneOf("HND")},
            {"graph": OneOf("none", "piecewise")},
            {"sinks": OneOf(True)},
            {"kv_offload_io": OneOf("kernel")},
            {"decode": OneOf(r.choice(NAMES)), "page_size": NoneOf(16)},
        ]
    )
    return Constraint(name=f"c{i}", when=side(), then=side(), because="a rule", plugin=plugin)


def question(seed: int) -> tuple[dict[str, Device], ModelSpec, EngineOptions, Catalog, Installed]:
    r = random.Random(seed)
    kinds = r.choice(
        [["d"], ["d"], ["d", "d"], ["d", "d"], ["encoder"], ["d", "linear"], ["d", "encoder"], ["d", "d", "d"]]
    )
    groups = {f"g{i}": group(r, k) for i, k in enumerate(kinds)}
    roles = sorted({role for g in groups.values() for role in g.roles})
    two = "decode" in roles and len(groups) < 3 and r.random() < 0.2
    devices = (
        {role: (BETA if two and role in ("decode", "kv_write") else ALPHA) for role in (*roles, "allreduce_fusion")}
        if two
        else {"": ALPHA}
    )
    least, most = (2, 3) if len(groups) > 2 else (2, 4) if len(groups) > 1 else (3, 6)
    catalogs = {}
    for device in {str(d): d for d in devices.values()}.values():
        plugins = [f"{device.platform}{i}" for i in range(2)]
        rows = [row(r, role, device, r.choice(plugins)) for role in roles for _ in range(r.randint(least, most))]
        rows.append(
            BackendSpec(
                backend="unfused", role="allreduce_fusion", platform=device.platform, tier=0, accepts={"graph": ANY}
            )
        )
        rows += [row(r, "allreduce_fusion", device, plugins[0]) for _ in range(r.randint(0, 2))]
        for role in roles:
            if role in ("prefill", "decode", "encode", "linear_prefill", "linear_decode") and r.random() < 0.6:
                rows.append(permissive(role, device, r.choice(plugins), r.randrange(2)))
        if "kv_write" in roles and r.random() < 0.8:
            accepts = {
                "dtype": ANY,
                "head_dim": ANY,
                "kv_cache_dtype": ANY,
                "kv_layout": OneOf("NHD", "HND"),
                "graph": ANY,
            }
            rows.append(
                BackendSpec(
                    backend="copy",
                    role="kv_write",
                    platform=device.platform,
                    tier=0,
                    accepts=accepts,
                    plugin=plugins[1],
                )
            )
        rules = tuple(constraint(r, i, r.choice(plugins)) for i in range(r.choice([0, 0, 0, 1, 2, 4])))
        catalogs[str(device)] = DeviceCatalog(tuple(rows), rules)
    pins: dict[str, Any] = {}
    if r.random() < 0.25:
        pins["page_size"] = r.choice([1, 16, 48, 64])
    if r.random() < 0.15:
        pins["kv_cache_dtype"] = r.choice(["fp8_e4m3", "bfloat16", "auto"])
    if r.random() < 0.15:
        pins["kv_layout"] = r.choice(["NHD", "HND"])
    if r.random() < 0.15:
        pins["graph"] = r.choice(["none", "full"])
    if r.random() < 0.15:
        pins[r.choice(["backend", "prefill_backend", "decode_backend"])] = r.choice(
            [r.choice(NAMES), {"g0": r.choice(NAMES)}]
        )
    if r.random() < 0.15:
        pins["deny"] = (r.choice(NAMES),)
    if r.random() < 0.15:
        pins["kv_offload_io"] = "kernel"
    if r.random() < 0.15:
        pins["tensor_parallel"] = 2
    installed = Installed(r.choice([{}, {"pkg": "1.5"}, {"pkg": "2.1", "gone": "1"}]))
    return devices, ModelSpec(groups=groups), EngineOptions(**pins), Catalog(catalogs), installed
