"""AMD's runtime and architectures as one table. A new chip is one row; a product is one word in it.

Names are compiler targets and say nothing by their digits: gfx1250 is CDNA5 while gfx1200 is RDNA4, and gfx942 has
nothing to do with NVIDIA's 9.x.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.spec import Device, PlatformSpec

# arch, LDS of a workgroup (KiB), tokens, products
_TABLE = (
    ("gfx90a", 64, frozenset({"mfma", "wave64"}), "mi210 mi250 mi250x"),
    ("gfx942", 64, frozenset({"mfma", "mfma_fp8_fnuz", "wave64"}), "mi300a mi300x mi308x mi325x"),
    ("gfx950", 160, frozenset({"mfma", "mfma_fp8", "wave64"}), "mi350x mi355x"),
    ("gfx1100", 64, frozenset({"wmma", "wave32"}), "rx7900xtx w7900"),
    ("gfx1151", 64, frozenset({"wmma", "wave32"}), "strix-halo"),
    ("gfx1200", 64, frozenset({"wmma", "wmma_fp8", "wave32"}), "rx9060xt"),
    ("gfx1201", 64, frozenset({"wmma", "wmma_fp8", "wave32"}), "rx9070xt"),
    ("gfx1250", None, frozenset({"wmma", "wmma_fp8", "wave32"}), ""),
)

KNOWN = {
    arch: Device(platform="rocm", arch=arch, isa=isa, shared_memory_per_block=None if kib is None else kib * 1024)
    for arch, kib, isa, _ in _TABLE
}
PRODUCTS = {product: arch for arch, _, _, products in _TABLE for product in products.split()}

PLATFORM = PlatformSpec(
    name="rocm",
    torch_device="cuda",
    dist_backend="nccl",
    visible_devices_env="HIP_VISIBLE_DEVICES",
    graph="torch.cuda:CUDAGraph",
    stream="torch.cuda:Stream",
    known=tuple(KNOWN.values()),
    aliases=PRODUCTS,
    specificity=1,  # CUDA tools on ROCm show the same devices
)


def describe(arch: str, **found: Any) -> Device:
    """A device that was found: what the table knows of its arch, and what the probe saw.

    An arch that the table lacks has no tokens, so only portable kernels are offered for it.
    """
    return replace(KNOWN.get(arch, Device(platform="rocm", arch=arch)), **found)
