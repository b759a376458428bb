"""NVIDIA's runtime and architectures as one table. A new chip is one row; a product is one word in it.

Tokens say what a kernel may execute, never how new a chip is: sm_120 and sm_121 are younger than sm_100 and lack
``tcgen05``, ``tmem`` and ``wgmma``. ``sm_100f`` and its like are CUDA's family targets: binaries built for one run on
every chip that has the token (PTX ISA, ``.target``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.spec import Device, PlatformSpec

TOOLKIT = "13.0"
"""CUDA version a what-if assumes: the oldest that serves every arch below."""

_TURING = frozenset({"mma_sync", "int8_mma"})
_AMPERE = _TURING | {"cp_async", "bf16_mma"}
_ADA = _AMPERE | {"fp8_mma"}
_HOPPER = _ADA | {"tma", "cluster", "wgmma"}
_TCGEN = _ADA | {"tma", "cluster", "tcgen05", "tmem", "fp4_mma"}
_GEFORCE = _ADA | {"tma", "fp4_mma"}

# arch, shared memory a block may opt in to (KiB; CUDA C++ Programming Guide, compute capabilities), tokens, products
_TABLE = (
    ("sm_75", 64, _TURING, "t4 rtx2080ti"),
    ("sm_80", 163, _AMPERE, "a100 a800 a30"),
    ("sm_86", 99, _AMPERE, "a10 a10g a40 rtxa6000 rtx3090"),
    ("sm_89", 99, _ADA, "l4 l40 l40s rtx4090"),
    ("sm_90", 227, _HOPPER, "h100 h200 h800 h20 gh200"),
    ("sm_100", 227, _TCGEN | {"sm_100f"}, "b200 gb200"),
    ("sm_103", 227, _TCGEN | {"sm_100f"}, "b300 gb300"),
    ("sm_110", 227, _TCGEN | {"sm_110f"}, "thor"),
    ("sm_120", 99, _GEFORCE | {"sm_120f"}, "rtx5090 rtx5080 rtxpro6000"),
    ("sm_121", 99, _GEFORCE | {"sm_120f"}, "gb10 dgx-spark"),
)

KNOWN = {
    arch: Device(platform="cuda", arch=arch, isa=isa, shared_memory_per_block=kib * 1024, versions={"cuda": TOOLKIT})
    for arch, kib, isa, _ in _TABLE
}
PRODUCTS = {product: arch for arch, _, _, products in _TABLE for product in products.split()}

_SM12X = (
    "vendors' wheels must hold code for sm_12x (cuobjdump --list-elf on their libraries): binaries for sm_90 or sm_100 "
    "do not run here",
    "FlashInfer compiles its kernels at first use: nvcc of that CUDA must be found (CUDA_HOME), and ninja on the PATH",
)
ADVICE = {
    "sm_120": _SM12X,
    "sm_121": (
        "Triton 3.6 and later bring an assembler that knows sm_121a; TRITON_PTXAS_BLACKWELL_PATH names another. Older "
        "Triton needs TRITON_PTXAS_PATH set to the ptxas of CUDA 13 (12.9 at least)",
        *_SM12X,
    ),
}
"""Sources: sglang PR 18758; Triton 3.6.0 and 3.8.0 backends/nvidia/compiler.py (get_ptxas; their ptxas are 12.9 and
13.3 for such chips); FlashInfer 0.7.2 utils.py, jit/core.py."""

PLATFORM = PlatformSpec(
    name="cuda",
    torch_device="cuda",
    dist_backend="nccl",
    visible_devices_env="CUDA_VISIBLE_DEVICES",
    graph="torch.cuda:CUDAGraph",
    stream="torch.cuda:Stream",
    known=tuple(KNOWN.values()),
    aliases=PRODUCTS,
    advice=ADVICE,
)


def describe(arch: str, **found: Any) -> Device:
    """A device that was found: what the table knows of its arch, and what the probe saw.

    An arch that the table lacks has no tokens, so only portable kernels are offered for it.
    """
    return replace(KNOWN.get(arch, Device(platform="cuda", arch=arch)), **found)
