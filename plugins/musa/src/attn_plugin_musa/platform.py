"""Moore Threads' runtime and architectures as one table. A new chip is one row; a product is one word in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.spec import Device, PlatformSpec

TOOLKIT = "4.3.6"
"""MUSA version a what-if assumes: the oldest that MATE runs on (MATE v0.2.2 README)."""

# arch (compute capability as mcc writes it), shared memory of a block (KiB; musaInfo, SDK 5.2), tokens, products.
# tme: the tensor memory engine, which MATE's fast loads use and compute capabilities below 3.1 lack (mutlass).
_TABLE = (
    ("mp21", None, frozenset[str](), "s80 s3000"),
    ("mp22", None, frozenset[str](), "s4000"),
    ("mp31", 192, frozenset({"tme"}), "s5000"),
)

KNOWN = {
    arch: Device(
        platform="musa",
        arch=arch,
        isa=isa,
        shared_memory_per_block=None if kib is None else kib * 1024,
        versions={"musa": TOOLKIT},
    )
    for arch, kib, isa, _ in _TABLE
}
PRODUCTS = {product: arch for arch, _, _, products in _TABLE for product in products.split()}

PLATFORM = PlatformSpec(
    name="musa",
    torch_device="musa",
    torch_module="torch_musa",
    dist_backend="mccl",
    visible_devices_env="MUSA_VISIBLE_DEVICES",
    graph="torch_musa:MUSAGraph",
    stream="torch_musa:Stream",
    known=tuple(KNOWN.values()),
    aliases=PRODUCTS,
    specificity=1,  # torchada shows MUSA devices to CUDA programs
)


def describe(arch: str, **found: Any) -> Device:
    """A device that was found: what the table knows of its arch, and what the probe saw."""
    return replace(KNOWN[arch], **found)
