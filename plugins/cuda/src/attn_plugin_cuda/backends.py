"""What the CUDA tables have in common, and what ``trtllm_mha`` promises.

The modules ``backends_*`` hold a family of kernels each. One block per backend: what all its roles accept, then what
each adds. Only what a source shows is claimed; a feature that is not there is refused. Where sources disagree the row
follows the one that refuses. Short names of the sources, with the versions read:

* FI: flashinfer-python 0.7.2.post1; FA: flash-attention 0251105a; FA4: flash-attn-4 4.0.0b36
* SK: sglang-kernel 0.4.10; SGLang 0.5.23; vLLM 0.33.0; threads by repository and number
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attn_core.domain import ANY, OneOf
from attn_core.spec import BackendSpec, Constraint, Device, Requirement, Tier
from attn_core.spec.fields import GRAPHS
from attn_plugin_cuda.platform import TOOLKIT

HALF = ["bfloat16", "float16"]
BOTH_LENGTHS = ["exact", "bounds"]
CAPTURED = OneOf(*GRAPHS)
"""A device graph may hold the call, whatever is in the batch."""
NOT_CAPTURED = OneOf("decode", "piecewise", "none")
"""For prefill: graphs of pure decode steps are no trouble, since it is not in them."""
ENCODER = OneOf("piecewise", "none", "decode")
"""For encoders that graphs cannot hold: nor are they in a decode step, but without a decoder that is no choice."""


def cuda(floor: str) -> Requirement:
    """The CUDA version that torch was built for: kernel packages look at that one, not at nvcc (FI utils.py)."""
    return Requirement(f"cuda>={floor}", written_for=TOOLKIT, install=f"use a torch built for CUDA {floor} or later")


FLASHINFER = Requirement(
    "flashinfer-python>=0.7",
    written_for="0.7.2.post1",
    symbols=("flashinfer.decode", "flashinfer.prefill"),
    install="pip install flashinfer-python",
)
CUTLASS_DSL = Requirement(
    "nvidia-cutlass-dsl>=4.6.2",
    written_for="4.6.2",
    symbols=("cutlass.cute",),
    install="pip install nvidia-cutlass-dsl",
)

FLASHINFER_CUDA = {"sm_100": "12.8", "sm_103": "12.9", "sm_110": "13.0", "sm_120": "12.8", "sm_121": "12.9"}
"""Arch -> oldest CUDA that FlashInfer compiles it for (FI utils.py, is_sm100a_supported and its kin)."""
KERNELS = "attn_plugin_cuda.kernels"
EVERY_STEP = "every step"
"""Of a kernel that the adapter names to its package: no rule of the package's own decides."""
TRTLLM_GEN = frozenset({"tcgen05", "tmem", "sm_100f"})
"""trtllm-gen ships binaries for the sm_100 family and nothing else (FI fmhaRunner.cuh:37)."""


def flashinfer_needs(device: Device) -> tuple[Requirement, ...]:
    floor = FLASHINFER_CUDA.get(device.arch)
    return (FLASHINFER, cuda(floor)) if floor else (FLASHINFER,)


def table(backend: str, evidence: str, roles: Mapping[str, Mapping[str, Any]], **more: Any) -> tuple[BackendSpec, ...]:
    """One row per role: ``roles`` maps it to what it accepts, the rest holds for all of them."""
    return tuple(
        BackendSpec(platform="cuda", backend=backend, role=role, accepts=accepts, evidence=evidence, **more)
        for role, accepts in roles.items()
    )


# ---- trtllm_mha ------------------------------------------------------------------------------------------------------
# No softcap, no cross attention, no encoders (it reads a paged cache), no LSE (rows without keys are not written).

_TRTLLM_ANY = {
    "dtype": HALF, "head_dim": [64, 128, 256], "sliding_window": True, "sinks": True, "custom_scale": True,
    "page_size": [64, 32, 16], "kv_cache_dtype": ["auto", "fp8_e4m3"], "kv_layout": ["HND", "NHD"],
    "host_lengths": BOTH_LENGTHS, "native_out": True,
}  # fmt: skip
_TRTLLM = table(
    "trtllm_mha",
    "FI fmhaRunner.cuh:37 (sm_100, 103, 107 only), trtllm_batch_context_with_kv_cache, "
    "trtllm_batch_decode_with_kv_cache; sglang PR 18758; SGLang trtllm_mha (softcap ignored, no cross attention)",
    {
        "prefill": {**_TRTLLM_ANY, "graph": NOT_CAPTURED},
        "decode": {**_TRTLLM_ANY, "graph": CAPTURED, "verify_width": ANY},
    },
    tier=Tier.BEST,
    needs=TRTLLM_GEN,
    requires=(FLASHINFER, cuda("12.8")),
    bind=f"{KERNELS}.trtllm_mha:bind",
    variants={"trtllm-gen": EVERY_STEP},
)


def rows(device: Device) -> Iterable[BackendSpec]:
    """Every row, whether or not the device can run it: the core explains why not."""
    return _TRTLLM


# ---- rules -----------------------------------------------------------------------------------------------------------


def _rules() -> Iterable[Constraint]:
    for role in ("prefill", "decode"):
        yield Constraint(
            name=f"fp8-latents-{role}",
            when={role: ["cutlass_mla", "cutedsl_mla"], "kind": "mla", "kv_cache_dtype": "fp8_e4m3"},
            then={"dtype": "bfloat16"},
            because="these kernels read an fp8 cache with q in fp8, and then their output is bfloat16",
            evidence="vLLM cutlass_mla.py; FI trtllm_batch_decode_with_kv_cache_mla",
        )
        yield Constraint(
            name=f"trtllm-{role}-fp8",
            when={role: "trtllm_mha", "kv_cache_dtype": "fp8_e4m3"},
            then={"dtype": "bfloat16"},
            because="trtllm-gen reads an fp8 cache with bfloat16 queries, not with float16 ones",
            evidence="FI trtllm_batch_decode_with_kv_cache (uses_bf16q_fp8kv)",
        )


RULES = tuple(_rules())
