"""Cost of importing, resolving and asking for the platform, in CPU time."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from harness import Result, cpu_time, ratios, result

from attn_core import (
    ANY,
    AttentionSpec,
    BackendSpec,
    Device,
    EngineOptions,
    ModelSpec,
    MultipleOf,
    NoBackendError,
    OneOf,
    get_platform,
)
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.resolve import Problem, resolve

DEVICE = Device(platform="cuda", arch="sm_90", isa=frozenset({"mma", "wgmma"}))
INSTALLED = Installed({f"package{i}": "2.0" for i in range(5)})


def imports() -> Iterator[Result]:
    """attn_core against what it cannot do without, each in fresh interpreters, in turn."""
    base, ours = "import pluggy, importlib.metadata", "import attn_core"
    a, b = [], []
    for _ in range(9):
        for code, out in ((base, a), (ours, b)):
            child = f"import time; t = time.process_time(); {code}; print(time.process_time() - t)"
            out.append(
                float(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
            )
    yield result("import attn_core / import pluggy and importlib.metadata", ratios(a, b), "x CPU", limit=3.0)
    yield result("import attn_core", [t * 1e3 for t in b], "ms CPU")
    check = "import attn_core, sys; sys.exit('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", check], check=False).returncode
    yield Result("torch imported by import attn_core", loaded, "", loaded, loaded, limit=0)


def rows(n: int, *, live: float, seed: int = 0) -> DeviceCatalog:
    """``n`` varied attention rows, a share of them eligible, and core's accompanying ones."""
    r = random.Random(seed)
    out = []
    for i in range(n):
        accepts = {
            "dtype": ["bfloat16", "float16"], "head_dim": [64, 128, 256], "sliding_window": True, "logit_softcap": True,
            "group_size": MultipleOf(1, max=64),
            "page_size": r.choice([ANY, MultipleOf(16), OneOf(64), OneOf(16, 32, 64), MultipleOf(8, max=256)]),
            "kv_cache_dtype": r.choice([["auto"], ["auto", "fp8_e4m3"]]),
            "graph": r.choice([["full", "none"], ["none"], ANY]),
            "kv_layout": r.choice([["NHD"], ["HND", "NHD"]]),
        }  # fmt: skip
        if r.random() < live:
            accepts["sinks"] = True
        out.append(
            BackendSpec(
                backend=f"b{i // 2}", role=("prefill", "decode")[i % 2], platform="cuda", tier=r.randrange(1, 4),
                rank=r.randrange(4), accepts=accepts, plugin="cuda", requires=(f"package{i % 5}>=1.2",),
                needs=frozenset({"mma"} if r.random() < 0.85 else {"tcgen05"}),
            )
        )  # fmt: skip
    writes = {"dtype": ANY, "head_dim": ANY, "kv_layout": ["NHD", "HND"], "kv_cache_dtype": ANY, "graph": ANY}
    out.append(
        BackendSpec(backend="torch_native", role="kv_write", platform="cuda", tier=0, accepts=writes, plugin="core")
    )
    out.append(BackendSpec(backend="unfused", role="allreduce_fusion", platform="cuda", tier=0, accepts={"graph": ANY}))
    return DeviceCatalog(tuple(out))


def group(**fields: object) -> AttentionSpec:
    return AttentionSpec(num_heads=64, num_kv_heads=8, head_dim=64, dtype="bfloat16", sinks=True, **fields)  # type: ignore[arg-type]


ONE = ModelSpec(groups={"full": group()})
THREE = ModelSpec(groups={"a": group(), "b": group(sliding_window=128), "c": group(logit_softcap=30.0)})


def case(n: int, model: ModelSpec, *, live: float) -> tuple[list[float], int]:
    catalog, options = Catalog({"cuda:sm_90": rows(n, live=live)}), EngineOptions()
    alive = sum(
        len(c) for s in Problem(DEVICE, model, options, catalog, INSTALLED).spaces for c in s.candidates.values()
    )
    return [t * 1e6 for t in cpu_time(lambda: resolve(DEVICE, model, options, catalog, INSTALLED))], alive


def refusing() -> Callable[[], object]:
    """A question to which 4 roles x 8 rows all say no, each for several reasons, with five pins to try without."""
    reasons: tuple[dict[str, Any], ...] = (
        {"accepts": {"head_dim": [128]}}, {"accepts": {"dtype": ["float16"]}}, {"needs": {"tcgen05"}},
        {"requires": ("vendor-kernels>=2",)}, {"accepts": {"page_size": [256], "group_size": [1]}},
        {"accepts": {"kv_layout": ["PRIVATE"]}}, {"needs": {"mfma"}, "requires": ("aiter",)},
        {"accepts": {"num_heads": [128], "graph": ["none"]}},
    )  # fmt: skip
    backends = [
        BackendSpec(
            backend=f"kernel{i}", role=role, platform="cuda", tier="BEST",
            **{k: v for k, v in r.items() if k != "accepts"},
            accepts={"dtype": ["bfloat16"], "head_dim": [64], "sliding_window": True, **r.get("accepts", {})},
        )
        for role in ("prefill", "decode", "kv_write", "encode")
        for i, r in enumerate(reasons)
    ]  # fmt: skip
    vision = AttentionSpec(num_heads=16, head_dim=72, dtype="bfloat16", attn_type="encoder_only")
    model = ModelSpec(groups={"full": group(), "vision": vision})
    options = EngineOptions(page_size=16, kv_layout="NHD", graph="full", deterministic=True, tensor_parallel=2)
    catalog = Catalog({"cuda:sm_90": DeviceCatalog(tuple(backends))})

    def refuse() -> object:
        try:
            return resolve(DEVICE, model, options, catalog, Installed())
        except NoBackendError as e:
            return e.text, len(e.rejections)

    return refuse


def resolving() -> Iterator[Result]:
    small, alive = case(60, ONE, live=0.5)
    yield result(f"resolve, 1 group, 60 rows ({alive} live)", small, "us CPU", limit=300)
    several, alive = case(24, THREE, live=1.1)
    yield result(f"resolve, 3 groups x 2 roles x 12 rows ({alive} live)", several, "us CPU", limit=5000)
    large, alive = case(600, ONE, live=0.5)
    yield result(f"resolve, 600 rows ({alive} live) / 60 rows", ratios(small, large), "x CPU", limit=12)
    yield result("refuse 4 roles x 8 rows, 5 pins", [t * 1e3 for t in cpu_time(refusing())], "ms CPU", limit=50)
    get_platform()
    yield result("get_platform() after the first call", [t * 1e6 for t in cpu_time(get_platform)], "us CPU", limit=1)


ALL = (imports, resolving)
