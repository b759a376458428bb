"""Dual chunk attention (Qwen2.5-1M): FlashAttention-3 over a query's own chunk, the one before, and earlier ones.

vLLM and SGLang had such a backend and dropped it; what it computes is taken from there. Their sparse form
(vertical-slash, beyond a length) is not offered: it is an approximation, and its kernels are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attn_core.domain import MultipleOf
from attn_core.spec import BackendSpec, Constraint, Device, Tier
from attn_plugin_cuda.backends import HALF, KERNELS, cuda, table
from attn_plugin_cuda.backends_flash import SGL_KERNEL

PAGES = (64, 128, 32, 16, 256, 512, 1024, 8, 4, 2, 1)
_ACCEPTS: dict[str, Any] = {
    "dtype": HALF, "head_dim": MultipleOf(8, max=256), "dual_chunk": MultipleOf(1, min=1), "custom_scale": True,
    "lse": True, "deterministic": True, "native_out": True, "page_size": [*PAGES], "device.arch": ["sm_90"],
}  # fmt: skip

_ROWS = table(
    "dual_chunk_flash_attn",
    "vLLM attention/backends/dual_chunk_flash_attn.py (006e0ac), SGLang dual_chunk_flashattention_backend.py "
    "(1951f6a): three calls and a merge by LSE, no device graphs, one query a decode row; SK sgl_kernel/flash_attn.py",
    {"prefill": _ACCEPTS, "decode": _ACCEPTS},
    tier=Tier.TUNED,
    needs={"wgmma", "tma"},
    requires=(SGL_KERNEL, cuda("12.3")),
    bind=f"{KERNELS}.dual_chunk:bind",
    variants={"fa3": "every step: own chunk causal, the one before and earlier ones whole, merged"},
)


def rows(device: Device) -> Iterable[BackendSpec]:
    return _ROWS


def _rules() -> Iterable[Constraint]:
    for role in ("prefill", "decode"):
        for page in PAGES[:-1]:
            yield Constraint(
                name=f"dual-chunk-{role}-pages-of-{page}",
                when={role: "dual_chunk_flash_attn", "page_size": page},
                then={"dual_chunk": MultipleOf(page)},
                because="a chunk must begin where a page begins, for it is read through a block table of its own",
                evidence="vLLM dual_chunk_flash_attn.py (chunk_len must be divisible by block_size)",
            )


RULES = tuple(_rules())
