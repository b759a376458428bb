"""What the FlashAttention kernels promise for ordinary attention: fa2, fa3 and fa4, and the rules about them.

Sources as in :mod:`attn_plugin_cuda.backends`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attn_core.domain import ANY, MultipleOf, NoneOf, OneOf
from attn_core.spec import BackendSpec, Constraint, Device, Requirement, Tier
from attn_plugin_cuda.backends import (
    BOTH_LENGTHS,
    CAPTURED,
    CUTLASS_DSL,
    ENCODER,
    HALF,
    KERNELS,
    NOT_CAPTURED,
    cuda,
    table,
)

SGL_KERNEL = Requirement(
    "sglang-kernel>=0.4",
    written_for="0.4.10",
    symbols=("sgl_kernel.flash_attn",),
    install="pip install sglang-kernel",
)
FLASH_ATTN = Requirement(
    "flash-attn>=2.6",
    written_for="2.8.3.post2",
    symbols=("flash_attn.flash_attn_interface",),  # flash-attn-4 owns the same top package
    install="pip install flash-attn",
)
FLASH_ATTN_4 = Requirement(
    "flash-attn-4>=4.0.0b36",
    written_for="4.0.0b36",
    symbols=("flash_attn.cute",),
    install="pip install --pre flash-attn-4",
)

# ---- fa2 -------------------------------------------------------------------------------------------------------------
# Portable, and ranked last: its pages are 256 tokens, which costs prefix reuse. For those who name it.

_FA2_ANY = {
    "dtype": HALF, "head_dim": MultipleOf(8, max=256), "device.arch": ["sm_80", "sm_86", "sm_89", "sm_90"],
    "sliding_window": True, "logit_softcap": True, "alibi": True, "custom_scale": True, "lse": True,
    "deterministic": True,
}  # fmt: skip
_FA2_PAGED = {
    **_FA2_ANY, "attn_type": ["decoder", "cross"], "page_size": MultipleOf(256), "host_lengths": BOTH_LENGTHS,
}  # fmt: skip
_FA2 = table(
    "fa2",
    "FA flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp (8.0 and later, head_dim, page % 256)",
    {
        "encode": {**_FA2_ANY, "attn_type": ["encoder_only"], "graph": ENCODER},
        "prefill": {**_FA2_PAGED, "graph": NOT_CAPTURED},
        "decode": {**_FA2_PAGED, "graph": CAPTURED, "verify_width": ANY},
    },
    tier=Tier.PORTABLE,
    rank=50,
    needs={"mma_sync", "cp_async"},
    requires=(FLASH_ATTN,),
    bind=f"{KERNELS}.fa2:bind",
)

# ---- fa3 -------------------------------------------------------------------------------------------------------------
# The sglang-kernel build: it has sinks, which upstream lacks, and is the one on PyPI. Hopper only: builds for 8.x
# exist, but the engines disagree on them.

_FA3_ANY = {
    "dtype": HALF, "head_dim": MultipleOf(8, max=256), "sliding_window": True, "logit_softcap": True,
    "custom_scale": True, "lse": True, "deterministic": True, "graph": CAPTURED, "native_out": True,
}  # fmt: skip
_FA3_PAGED = {
    **_FA3_ANY, "attn_type": ["decoder", "cross"], "unequal_v": True, "sinks": True, "attention_chunk": True,
    "page_size": ANY, "kv_cache_dtype": ["auto", "fp8_e4m3"], "host_lengths": BOTH_LENGTHS,
}  # fmt: skip
FA3_NEEDS: dict[str, Any] = {
    "needs": {"wgmma", "tma"}, "requires": (SGL_KERNEL, cuda("12.3")), "bind": f"{KERNELS}.fa3:bind",
}  # fmt: skip
_FA3 = table(
    "fa3",
    "SK sgl_kernel/flash_attn.py (sinks, attention_chunk); FA hopper/ (widths, fp8); SGLang is_fa3_supported; "
    "sglang PR 23139 (no decode under kernel-driven KV offload)",
    {
        "encode": {**_FA3_ANY, "attn_type": ["encoder_only"]},
        "prefill": _FA3_PAGED,
        "decode": {**_FA3_PAGED, "verify_width": ANY, "kv_offload_io": NoneOf("kernel")},
    },
    tier=Tier.BEST,
    **FA3_NEEDS,
)

# ---- fa4 -------------------------------------------------------------------------------------------------------------
# CuTe-DSL. Its wheel also runs on 9.0, 11.0 and 12.x with fewer features; offered where the engines use it.

_FA4_ANY = {
    "dtype": HALF, "device.arch": ["sm_100", "sm_103"], "sliding_window": True, "logit_softcap": True,
    "custom_scale": True, "lse": True, "graph": CAPTURED,
}  # fmt: skip
_FA4_PAGED = {
    **_FA4_ANY, "attn_type": ["decoder", "cross"], "unequal_v": True, "sinks": True, "page_size": [128],
    "head_dims": [*((w, w) for w in range(8, 129, 8)), (192, 128), (256, 256)], "host_lengths": BOTH_LENGTHS,
}  # fmt: skip
_FA4_SOURCES = "FA4 flash_attn/cute/interface.py:844-1775; vLLM fa_utils.py (head_dim 256); SGLang (page 128 on SM100)"
_FA4_ROW: dict[str, Any] = {
    "tier": Tier.BEST, "rank": 10, "needs": {"tcgen05", "tmem"},
    "requires": (FLASH_ATTN_4, CUTLASS_DSL, cuda("12.8")),
}  # fmt: skip
_FA4_FP8 = {**_FA4_PAGED, "kv_cache_dtype": ["fp8_e4m3"]}
_FA4 = (
    *table(
        "fa4",
        _FA4_SOURCES,
        {
            "encode": {**_FA4_ANY, "attn_type": ["encoder_only"], "head_dim": MultipleOf(8, max=128)},
            "prefill": _FA4_PAGED,
            "decode": {**_FA4_PAGED, "verify_width": ANY},
        },
        bind=f"{KERNELS}.fa4:bind",
        **_FA4_ROW,
    ),
    # The wheel's public function takes no descales: decided and explained for engines with builds of their own.
    *table("fa4", _FA4_SOURCES, {"prefill": _FA4_FP8, "decode": {**_FA4_FP8, "verify_width": ANY}}, **_FA4_ROW),
)


def rows(device: Device) -> Iterable[BackendSpec]:
    """Every row, whether or not the device can run it: the core explains why not."""
    return (*_FA2, *_FA3, *_FA4)


# ---- rules -----------------------------------------------------------------------------------------------------------


def _rules() -> Iterable[Constraint]:
    for role in ("prefill", "decode"):
        yield Constraint(
            name=f"fa3-{role}-unequal-widths",
            when={role: "fa3", "kind": "mha", "unequal_v": OneOf(True)},
            then={"head_dims": [(192, 128)]},
            because="fa3 is compiled for few pairs of unequal widths; 192/128 is the one in use",
            evidence="FA hopper/flash_api.cpp (129..192 with 97..128 on SM90); SGLang (MiMo-V2 on SM90)",
        )
        yield Constraint(
            name=f"fa3-{role}-fp8-width",
            when={role: "fa3", "kind": "mha", "kv_cache_dtype": "fp8_e4m3"},
            then={"head_dim": MultipleOf(16)},
            because="fa3 reads fp8 caches in rows of 16 bytes",
            evidence="FA hopper/flash_api.cpp (head_dim % 16 for fp8)",
        )
        yield Constraint(
            name=f"fa3-{role}-fp8-output",
            when={role: "fa3", "kind": "mha", "kv_cache_dtype": "fp8_e4m3"},
            then={"dtype": "bfloat16"},
            because="fa3 reads an fp8 cache with q in fp8, and then its output is bfloat16",
            evidence="FA hopper/flash_api.cpp (output of fp8 inputs); SGLang flashattention_backend.py (q to fp8)",
        )
        yield Constraint(
            name=f"fa4-{role}-head-dim-256",
            when={role: "fa4", "head_dims": [(256, 256)]},
            then={"sinks": False, "logit_softcap": None, "kv_cache_dtype": "auto"},
            because="fa4's kernel for head_dim 256 has neither sinks nor softcap and reads no quantised cache",
            evidence="vLLM fa_utils.py (head_dim 256 on 10.x)",
        )


RULES = tuple(_rules())
