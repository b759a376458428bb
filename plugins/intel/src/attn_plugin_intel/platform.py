"""Intel's GPU runtime and architectures as one table. A new chip is one row; a product is one word in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.spec import Device, PlatformSpec

# arch, tokens, products
_TABLE = (
    ("pvc", frozenset({"xe_hpc", "xmx", "fp64"}), "max1100 max1450 max1550"),
    ("bmg", frozenset({"xe2", "xmx"}), "b570 b580 b50 b60 b65 b70"),
    ("lnl", frozenset({"xe2", "xmx"}), "arc130v arc140v"),
    ("ptl", frozenset({"xe3", "xmx"}), ""),
)

KNOWN = {arch: Device(platform="xpu", arch=arch, isa=isa) for arch, isa, _ in _TABLE}
PRODUCTS = {product: arch for arch, _, products in _TABLE for product in products.split()}

PLATFORM = PlatformSpec(
    name="xpu",
    torch_device="xpu",
    dist_backend="xccl",
    visible_devices_env="ZE_AFFINITY_MASK",
    graph="torch.xpu:XPUGraph",
    stream="torch.xpu:Stream",
    known=tuple(KNOWN.values()),
    aliases=PRODUCTS,
)


def describe(arch: str, **found: Any) -> Device:
    """A device that was found: what the table knows of its arch, and what the probe saw."""
    return replace(KNOWN[arch], **found)
