"""What the CUDA kernels promise for ordinary attention (MHA, GQA, encoders, cross attention) and all-reduce fusion.

One block per backend: what all its roles accept, then what each adds. Only what a source shows is claimed; a feature
that is not there is refused. Where sources disagree the row follows the one that refuses. Short names of the sources,
with the versions read:

* FI: flashinfer-python 0.7.2.post1; FA: flash-attention 0251105a; FA4: flash-attn-4 4.0.0b36
* SK: sglang-kernel 0.4.10; SGLang 0.5.23; vLLM 0.33.0; threads by repository and number
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attn_core.domain import ANY, MultipleOf, OneOf
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


# ---- flashinfer ------------------------------------------------------------------------------------------------------
# fa2 kernels from templates, on 8.0 and later. Turing is left to Triton: flashinfer issue 3620, which vLLM fences off.
# No sinks: the plain wrappers take sinks= and drop it on fa2, fa3 and CUDA-core decode. The variant that applies them
# has a name of its own, ``flashinfer_sinks`` (backends_flashinfer).

_FI = (
    "FI prefill.py:835-905 (sinks are dropped), attention/_core.py:431 (sink wrapper), attention/prefill.cuh:377-394 "
    "(widths); sglang PR 23139, PR 18758; vLLM flashinfer.py:696 (Turing)"
)
_FI_ANY = {
    "dtype": HALF, "custom_scale": True, "lse": True, "logit_softcap": True, "deterministic": True, "native_out": True,
}  # fmt: skip
_FI_PAGED = {
    **_FI_ANY, "attn_type": ["decoder", "cross"], "head_dims": [(64, 64), (128, 128), (256, 256), (192, 128)],
    "unequal_v": True, "sliding_window": True, "page_size": ANY,
    "kv_cache_dtype": ["auto", "fp8_e4m3", "fp8_e5m2"], "kv_layout": ["NHD", "HND"],
}  # fmt: skip


XQA = {
    "dtype": HALF, "device.arch": ["sm_120", "sm_121"], "head_dim": MultipleOf(16, max=256), "custom_scale": True,
    "sliding_window": True, "page_size": [16, 32, 64, 128], "kv_cache_dtype": ["auto", "fp8_e4m3"],
    "kv_layout": ["NHD", "HND"], "graph": CAPTURED, "host_lengths": BOTH_LENGTHS, "native_out": True,
}  # fmt: skip
"""XQA's decode, without sinks."""


def _flashinfer(device: Device) -> tuple[BackendSpec, ...]:
    requires = flashinfer_needs(device)
    tuned: dict[str, Any] = {"tier": Tier.TUNED, "requires": requires}
    fa2 = {
        "needs": {"mma_sync", "cp_async"}, "bind": f"{KERNELS}.flashinfer:bind",
        "variants": {"fa2": EVERY_STEP}, **tuned,
    }  # fmt: skip
    return (
        *(_flashinfer_hopper(requires) if device.arch == "sm_90" else ()),
        # Ragged and not causal. Widths below 64 run padded; the scale stays the model's own.
        *table(
            "flashinfer",
            f"sglang PR 6230, issue 6050; flashinfer issue 1048; {_FI}",
            {"encode": {**_FI_ANY, "attn_type": ["encoder_only"], "head_dim": [64, 128, 256], "graph": ENCODER}},
            pads={"head_dim"},
            **fa2,
        ),
        *table("flashinfer", _FI, {"prefill": {**_FI_PAGED, "graph": NOT_CAPTURED}}, **fa2),
        # On tensor cores decode is the paged prefill kernel with few queries: hence its pairs and masks. After XQA.
        *table(
            "flashinfer",
            f"{_FI}; FI decode.py (use_tensor_cores)",
            {"decode": {**_FI_PAGED, "graph": CAPTURED, "verify_width": ANY, "tree_mask": True}},
            rank=1,
            **fa2,
        ),
        # XQA. It takes sinks, but FlashInfer's prefill drops them: with them it is ``flashinfer_sinks``.
        *table(
            "flashinfer",
            "FI xqa.py:402, jit/xqa.py (widths, pages); sglang PR 18758 (XQA decode on SM12x)",
            {"decode": XQA},
            bind=f"{KERNELS}.xqa:bind",
            variants={"xqa": EVERY_STEP},
            **tuned,
        ),
        # Compiled for majors 9, 10 and 12. Kernels exist for 2, 4, 8 and 16 ranks, but the rule that chooses one or two
        # rounds of messages knows 2, 4 and 8.
        *table(
            "flashinfer",
            "FI jit/comm.py:47,182,198,406, comm/trtllm_ar.py:712, trtllm_allreduce_fusion.cuh:1709,1936; "
            "sglang PR 18758",
            {
                "allreduce_fusion": {
                    "dtype": HALF, "device.arch": ["sm_90", "sm_100", "sm_103", "sm_120", "sm_121"],
                    "tensor_parallel": [2, 4, 8], "graph": CAPTURED,
                }
            },
            bind=f"{KERNELS}.allreduce:bind",
            **tuned,
        ),
    )  # fmt: skip


def _flashinfer_hopper(requires: tuple[Requirement, ...]) -> tuple[BackendSpec, ...]:
    """flashinfer's fa3 kernels: what its own rule takes on Hopper. No masks, no 8-bit caches under 16-bit queries, and
    no fixed splits."""
    accepts = {
        "dtype": HALF, "custom_scale": True, "lse": True, "logit_softcap": True, "native_out": True,
    }  # fmt: skip
    pairs = [(64, 64), (128, 128), (256, 256), (192, 128)]
    return table(
        "flashinfer",
        "FI utils.py:616 (is_fa3_backend_supported, is_fa3_prefill_head_dim_supported), prefill.py",
        {
            "encode": {**accepts, "attn_type": ["encoder_only"], "head_dim": [64, 128, 256], "graph": ENCODER},
            "prefill": {
                **accepts, "attn_type": ["decoder", "cross"], "head_dims": pairs, "unequal_v": True, "page_size": ANY,
                "sliding_window": True, "kv_layout": ["NHD", "HND"], "graph": NOT_CAPTURED,
            },
        },
        tier=Tier.TUNED,
        rank=-1,
        needs={"wgmma", "tma"},
        requires=(*requires, cuda("12.3")),
        bind=f"{KERNELS}.flashinfer:bind_fa3",
        variants={"fa3": EVERY_STEP},
    )  # fmt: skip


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
    return (*_flashinfer(device), *_TRTLLM)


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
        yield Constraint(
            name=f"flashinfer-{role}-cross-window",
            when={role: "flashinfer", "attn_type": "cross"},
            then={"sliding_window": None},
            because="flashinfer plans cross attention without a window",
            evidence="SGLang flashinfer_backend.py (two wrappers, either window or cross)",
        )


RULES = tuple(_rules())
