"""Huawei Ascend's runtime and architectures as one table. A new chip is one row; a product is one word in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.spec import Device, PlatformSpec

_CUBE = frozenset({"cube", "vector"})

# arch, tokens, products. SoC numbers of torch.npu.get_soc_version() (vllm-ascend device/hardware.py): 200-205 310P,
# 220-225 A2 (910B), 250-255 A3 (910C), 260 A5 (950). 310P's cube units have no bfloat16.
_TABLE = (
    ("310p", _CUBE, "310p3 atlas-300i-duo"),
    ("910b", _CUBE | {"cube_bf16"}, "910b1 910b2 910b3 910b4 atlas-a2"),
    ("910c", _CUBE | {"cube_bf16"}, "910_93 atlas-a3"),
    ("950", _CUBE | {"cube_bf16"}, "atlas-a5"),
)

KNOWN = {arch: Device(platform="ascend", arch=arch, isa=isa) for arch, isa, _ in _TABLE}
PRODUCTS = {product: arch for arch, _, products in _TABLE for product in products.split()}

PLATFORM = PlatformSpec(
    name="ascend",
    torch_device="npu",
    torch_module="torch_npu",
    dist_backend="hccl",
    visible_devices_env="ASCEND_RT_VISIBLE_DEVICES",
    graph="torch_npu.npu:NPUGraph",
    stream="torch_npu.npu:Stream",
    known=tuple(KNOWN.values()),
    aliases=PRODUCTS,
)


def describe(arch: str, **found: Any) -> Device:
    """A device that was found: what the table knows of its arch, and what the probe saw."""
    return replace(KNOWN[arch], **found)
