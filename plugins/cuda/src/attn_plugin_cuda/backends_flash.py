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


def vllm(symbol: str, floor: str = "0.30") -> Requirement:
    """vLLM, for one of the FlashAttention builds that it ships: each has a file of its own, which proves it."""
    return Requirement(
        f"vllm>={floor}",
        written_for="0.33.0",
        symbols=(f"vllm.vllm_flash_attn.{symbol}",),
        install="pip install vllm (for its FlashAttention)",
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
FLASH_ATTN_3 = Requirement(
    "flash-attn-3>=3.0",
    written_for="3.0.0",
    symbols=("flash_attn_3._C",),  # MATE's wrapper has the same name and the same flash_attn_interface, no extension
    install="build it from hopper/ of the repository Dao-AILab/flash-attention; PyPI does not have it",
)
FLASH_ATTN_4 = Requirement(
    "flash-attn-4>=4.0.0b36",
    written_for="4.0.0b36",
    symbols=("flash_attn.cute",),
    install="pip install --pre flash-attn-4",
)
VLLM_FA2, VLLM_FA3 = vllm("_vllm_fa2_C"), vllm("_vllm_fa3_C")
VLLM_FA4 = vllm("cute.interface", "0.33")
"""Its descales arrived in the interface of 0.33."""
_VFA = "vLLM 0.33.0 vllm_flash_attn/flash_attn_interface.py; vllm-project/flash-attention 617264c1"

# ---- fa2 -------------------------------------------------------------------------------------------------------------
# Portable, and ranked last, vLLM's first: its pages are multiples of 16, upstream's of 256, which costs prefix reuse.
# For those who name it.

_FA2_ANY = {
    "dtype": HALF, "head_dim": MultipleOf(8, max=256), "device.arch": ["sm_80", "sm_86", "sm_89", "sm_90"],
    "sliding_window": True, "logit_softcap": True, "alibi": True, "custom_scale": True, "lse": True,
    "deterministic": True,
}  # fmt: skip


def _fa2(package: Requirement, bind: str, rank: int, evidence: str, page: int, **more: Any) -> tuple[BackendSpec, ...]:
    every = {**_FA2_ANY, **more}
    paged = {**every, "attn_type": ["decoder", "cross"], "page_size": MultipleOf(page), "host_lengths": BOTH_LENGTHS}
    return table(
        "fa2",
        evidence,
        {
            "encode": {**every, "attn_type": ["encoder_only"], "graph": ENCODER},
            "prefill": {**paged, "graph": NOT_CAPTURED},
            "decode": {**paged, "graph": CAPTURED, "verify_width": ANY},
        },
        tier=Tier.PORTABLE,
        rank=rank,
        needs={"mma_sync", "cp_async"},
        requires=(package,),
        bind=f"{KERNELS}.{bind}",
    )


_FA2 = (
    *_fa2(
        VLLM_FA2,
        "flash:bind_vllm_fa2",
        49,
        f"{_VFA} csrc/flash_attn/flash_api.cpp (page % 16, no sinks)",
        page=16,
        native_out=True,
    ),
    *_fa2(
        FLASH_ATTN,
        "fa2:bind",
        50,
        "FA flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp (8.0 and later, head_dim, page % 256)",
        page=256,
    ),
)

# ---- fa3 -------------------------------------------------------------------------------------------------------------
# Three builds of one kernel, tried in this order. Hopper only: builds for 8.x exist, but the engines disagree on them.
# Each claims what its package has: upstream no sinks and no out=, vLLM's no chunks.


def fa3_of(package: Requirement, bind: str, rank: int) -> dict[str, Any]:
    """What all rows of one package have in common."""
    return {
        "tier": Tier.BEST, "rank": rank, "needs": {"wgmma", "tma"}, "requires": (package, cuda("12.3")),
        "bind": f"{KERNELS}.flash:{bind}",
    }  # fmt: skip


FA3_SGL = fa3_of(SGL_KERNEL, "bind_sgl_fa3", 0)
FA3_VLLM = fa3_of(VLLM_FA3, "bind_vllm_fa3", 1)
FA3_UPSTREAM = fa3_of(FLASH_ATTN_3, "bind_upstream_fa3", 2)

_FA3_ANY = {
    "dtype": HALF, "head_dim": MultipleOf(8, max=256), "sliding_window": True, "logit_softcap": True,
    "custom_scale": True, "lse": True, "deterministic": True, "graph": CAPTURED,
}  # fmt: skip
_FA3_ENCODE = {**_FA3_ANY, "attn_type": ["encoder_only"]}
_FA3_PAGED = {
    **_FA3_ANY, "attn_type": ["decoder", "cross"], "page_size": ANY, "kv_cache_dtype": ["auto", "fp8_e4m3"],
    "host_lengths": BOTH_LENGTHS,
}  # fmt: skip
_FA3_DECODE = {"verify_width": ANY, "kv_offload_io": NoneOf("kernel")}
_FILLS = {"native_out": True}
_UNEQUAL = {"unequal_v": True}
_FA3_SOURCES = "FA hopper/ (widths, fp8); sglang PR 23139 (no decode under kernel-driven KV offload)"


def _fa3(evidence: str, of: dict[str, Any], **more: Any) -> tuple[BackendSpec, ...]:
    """Prefill and decode over pages."""
    paged = {**_FA3_PAGED, **more}
    return table("fa3", f"{evidence}; {_FA3_SOURCES}", {"prefill": paged, "decode": {**paged, **_FA3_DECODE}}, **of)


_SK = "SK sgl_kernel/flash_attn.py (sinks, attention_chunk); SGLang is_fa3_supported"
_UP = "FA hopper/flash_attn_interface.py, flash_api_stable.cpp (attention_chunk, no sinks)"
_VPAGES = {"page_size": MultipleOf(16)}
_FA3 = (
    *table("fa3", f"{_SK}; {_FA3_SOURCES}", {"encode": {**_FA3_ENCODE, **_FILLS}}, **FA3_SGL),
    *_fa3(_SK, FA3_SGL, **_UNEQUAL, **_FILLS, sinks=True, attention_chunk=True),
    *table("fa3", f"{_VFA}; {_FA3_SOURCES}", {"encode": {**_FA3_ENCODE, **_FILLS}}, **FA3_VLLM),
    *_fa3(f"{_VFA} hopper/flash_api.cpp; vLLM flash_attn.py (page % 16)", FA3_VLLM, **_UNEQUAL, **_FILLS, **_VPAGES),
    *_fa3(
        f"{_VFA} hopper/flash_api.cpp (sinks: at most 64 query heads, one width)",
        FA3_VLLM,
        **_FILLS,
        **_VPAGES,
        sinks=True,
        num_heads=MultipleOf(1, max=64),
    ),
    *table("fa3", f"{_UP}; {_FA3_SOURCES}", {"encode": _FA3_ENCODE}, **FA3_UPSTREAM),
    *_fa3(_UP, FA3_UPSTREAM, **_UNEQUAL, attention_chunk=True),
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
_FA4_ROW: dict[str, Any] = {"tier": Tier.BEST, "needs": {"tcgen05", "tmem"}}
_FA4_ENCODE = {**_FA4_ANY, "attn_type": ["encoder_only"], "head_dim": MultipleOf(8, max=128)}
_FA4_NARROW = {**_FA4_PAGED, "head_dims": [*((w, w) for w in range(8, 129, 8)), (192, 128)], **_FILLS}
"""Without the kernel of head_dim 256, which wants lengths and tables in whole pages."""
_FA4_FP8 = {
    **_FA4_NARROW, "dtype": ["bfloat16"], "head_dims": [*((w, w) for w in range(16, 129, 16)), (192, 128)],
    "kv_cache_dtype": ["fp8_e4m3"],
}  # fmt: skip
_VFA4 = f"{_VFA} (fa_version=4), cute/interface.py; {_FA4_SOURCES}"
_FA4_VLLM: dict[str, Any] = {
    "requires": (VLLM_FA4, CUTLASS_DSL, cuda("12.8")), "bind": f"{KERNELS}.flash:bind_vllm_fa4", **_FA4_ROW,
}  # fmt: skip
_FA4 = (
    *table(
        "fa4",
        _FA4_SOURCES,
        {"encode": _FA4_ENCODE, "prefill": _FA4_PAGED, "decode": {**_FA4_PAGED, "verify_width": ANY}},
        requires=(FLASH_ATTN_4, CUTLASS_DSL, cuda("12.8")),
        bind=f"{KERNELS}.fa4:bind",
        rank=10,
        **_FA4_ROW,
    ),
    *table(
        "fa4",
        _VFA4,
        {
            "encode": {**_FA4_ENCODE, **_FILLS},
            "prefill": _FA4_NARROW,
            "decode": {**_FA4_NARROW, "verify_width": ANY},
        },
        rank=11,
        **_FA4_VLLM,
    ),
    # 8-bit caches through vLLM alone: the function of flash-attn-4 takes no descales. Last, so that they are asked for.
    *table(
        "fa4",
        f"{_VFA4} (fp8 on 10.x: one dtype, descales (rows, kv heads), bfloat16 out, widths % 16)",
        {"prefill": _FA4_FP8, "decode": {**_FA4_FP8, "verify_width": ANY}},
        rank=12,
        **_FA4_VLLM,
    ),
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
