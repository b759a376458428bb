"""What FlashInfer's kernels promise for ordinary attention and all-reduce fusion: fa2, fa3, XQA, CUTLASS, cuDNN and
fmha_v2 under the name ``flashinfer``; under ``flashinfer_sinks`` those that apply attention sinks.

Sources as in :mod:`attn_plugin_cuda.backends`. But for fa2's, XQA's and all-reduce's, a row is there only on
architectures whose kernel exists, so that an explanation elsewhere does not list it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attn_core.domain import ANY, MultipleOf
from attn_core.spec import BackendSpec, Constraint, Device, Requirement, Tier
from attn_plugin_cuda.backends import (
    BOTH_LENGTHS,
    CAPTURED,
    ENCODER,
    EVERY_STEP,
    HALF,
    KERNELS,
    NOT_CAPTURED,
    cuda,
    flashinfer_needs,
    table,
)

CUDNN_FRONTEND = Requirement(
    "nvidia-cudnn-frontend>=1.31",
    written_for="1.31.0",
    symbols=("cudnn",),
    install="pip install nvidia-cudnn-frontend",
)
CUDNN_DSL = Requirement(
    "nvidia-cutlass-dsl>=4.7",
    written_for="4.7.1",
    symbols=("cutlass.cute",),
    install="pip install 'nvidia-cutlass-dsl>=4.7'",
)
"""What cuDNN's kernel for several queries per row is written in; an older one leaves them to a prefill kernel."""
CUTLASS_ARCHS = frozenset({"sm_100", "sm_103", "sm_110"})
CUDNN_ARCHS = frozenset({"sm_100", "sm_103"})

IN_ROOM = {"cutlass": "up to 131072 tiles of 256 queries times heads", "fa2": "beyond"}
"""CUTLASS's plan writes its tiles into buffers of that size, and with the backend named nobody checks that they fit."""


def cudnn_needs(device: Device) -> tuple[Requirement, ...]:
    """Without the frontend FlashInfer takes binaries of its own, which do less; with an older cuDNN it converts
    offsets in every call."""
    major = device.versions.get("cuda", "13").partition(".")[0]
    cudnn = Requirement(
        f"nvidia-cudnn-cu{major}>=9.25",
        written_for="9.26.0",
        symbols=("nvidia.cudnn",),
        install=f"pip install nvidia-cudnn-cu{major}",
    )
    return (*flashinfer_needs(device), CUDNN_FRONTEND, cudnn)


# ---- fa2, fa3, xqa and all-reduce ------------------------------------------------------------------------------------
# fa2 kernels from templates, on 8.0 and later. Turing is left to Triton: flashinfer issue 3620, which vLLM fences off.
# No sinks: the plain wrappers take sinks= and drop it on fa2, fa3 and CUDA-core decode. The variant that applies them
# has a name of its own, ``flashinfer_sinks`` (below).

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


# ---- cutlass and cudnn over ragged keys ------------------------------------------------------------------------------
# FlashInfer's own rule on Blackwell, which its makers measured on B200: cuDNN, then CUTLASS, then fa2. For widths that
# the rule leaves to fa2 they stand behind it, and nothing is padded to get there. Neither is given windows, soft caps
# or masks, or has fixed splits. CUTLASS writes its output by shape alone and cuDNN wants it contiguous, so that one of
# the caller's goes through the core's copy.

CUTLASS_SOURCES = (
    "FI prefill.py:2431-2570 (_blackwell_ragged_auto_upgrade), data/csrc/fmha_cutlass_sm100.cu (pairs of widths, "
    "strides), attention/blackwell/plan.cuh (work items)"
)
CUDNN_SOURCES = (
    "FI prefill.py:2431-2570 (_blackwell_ragged_auto_upgrade; B200), cudnn/prefill.py; NVBug 6783545 (LSE of single "
    "queries under grouped heads, cuDNN 9.26 and 9.27)"
)
_ENCODE = {"attn_type": ["encoder_only"], "dtype": HALF, "custom_scale": True, "lse": True, "graph": ENCODER}


def _encoders(device: Device) -> tuple[BackendSpec, ...]:
    tuned: dict[str, Any] = {"tier": Tier.TUNED, "needs": {"tcgen05", "tmem"}}
    cutlass = {
        "bind": f"{KERNELS}.flashinfer:bind_cutlass", "variants": IN_ROOM, "requires": flashinfer_needs(device),
        **tuned,
    }  # fmt: skip
    cudnn = {
        "bind": f"{KERNELS}.flashinfer:bind_cudnn", "variants": {"cudnn": EVERY_STEP}, "requires": cudnn_needs(device),
        **tuned,
    }  # fmt: skip
    return (
        *table("flashinfer", CUTLASS_SOURCES, {"encode": {**_ENCODE, "head_dim": [128]}}, rank=-1, **cutlass),
        *table("flashinfer", CUTLASS_SOURCES, {"encode": {**_ENCODE, "head_dim": [64]}}, rank=1, **cutlass),
        *(
            table(
                "flashinfer",
                CUDNN_SOURCES,
                {"encode": {**_ENCODE, "head_dim": [128, 256], "group_size": [1]}},
                rank=-2,
                **cudnn,
            )
            if device.arch in CUDNN_ARCHS
            else ()
        ),
    )


# ---- cudnn over pages ------------------------------------------------------------------------------------------------
# Behind fa2: it was measured ahead for a few shapes of verify rows only. It needs no lengths on the host, so it serves
# where those are bounds. LSE of prefill only where every head has keys of its own: for single queries of grouped heads
# cuDNN writes the first head of a group only, and that call has no check for it. 8-bit caches fail on Blackwell.


def _cudnn(device: Device) -> tuple[BackendSpec, ...]:
    paged = {
        "dtype": HALF, "custom_scale": True, "page_size": [16, 32, 64, 128, 256, 512], "kv_layout": ["HND", "NHD"],
        "host_lengths": BOTH_LENGTHS,
    }  # fmt: skip
    prefill = {**paged, "head_dims": [(128, 128), (192, 128)], "unequal_v": True, "graph": NOT_CAPTURED}
    sources = (
        "FI cudnn/prefill.py (widths, units of offsets, LSE), tests/attention/test_cudnn_prefill.py (pages, 8 bits); "
        "flashinfer PR 4626 (large pages, causal alignment), PR 3784 (lengths of one axis), PR 4270"
    )
    decode = {**paged, "head_dim": [128, 256], "sliding_window": True, "lse": True, "graph": CAPTURED}
    decoding = (
        "FI cudnn/decode.py, decode.py:665-800 (_auto_decode_prefers_cudnn: widths, pages, up to 4 queries), "
        "tests/attention/test_cudnn_decode.py (LSE of grouped heads); flashinfer PR 4625"
    )
    more: dict[str, Any] = {
        "tier": Tier.TUNED, "rank": 2, "needs": {"tcgen05", "tmem"}, "requires": cudnn_needs(device),
        "bind": f"{KERNELS}.flashinfer_cudnn:bind", "variants": {"cudnn": EVERY_STEP},
    }  # fmt: skip
    return (
        *table("flashinfer", sources, {"prefill": prefill}, **more),
        *table(
            "flashinfer",
            f"{sources}; NVBug 6783545 (LSE under grouped heads)",
            {"prefill": {**prefill, "lse": True, "group_size": [1]}},
            **more,
        ),
        *table("flashinfer", decoding, {"decode": decode}, **more),
        *table(
            "flashinfer",
            f"{decoding}; FI cudnn/utils.py (cudnn_frontend_frost_runtime_available)",
            {"decode": {**decode, "verify_width": [2, 3, 4]}},
            **{**more, "requires": (*more["requires"], CUDNN_DSL)},
        ),
    )  # fmt: skip


# ---- fmha_v2 ---------------------------------------------------------------------------------------------------------
# Behind fa2 and fa3: on SM12x FlashInfer's kernel is fa2 (sglang PR 18758). It needs no lengths on the host. bfloat16
# only: in float16 it accumulates in float16 too. Encoders only: over pages it finds values relative to the keys'
# address, so that both would have to lie in one allocation, which neither the core's caches nor all engines' do. No
# alibi: it makes slopes of its own from the heads it sees, which are wrong on a rank of several.

_FMHA_V2_WIDTHS = {
    "sm_90": [32, 40, 48, 64, 80, 96, 104, 128, 160, 192, 256],
    "sm_120": [64, 128, 256],
    "sm_121": [64, 128, 256],
}


def _fmha_v2(device: Device) -> tuple[BackendSpec, ...]:
    return table(
        "flashinfer",
        "FI prefill.py trtllm_fmha_v2_prefill, jit/attention/fmha_v2/fmha_library.py (generate_jit_sources and "
        "is_kernel_spec_valid: widths, layouts), data/csrc/fmha_v2_run.cu (accumulation, strides, softmax stats)",
        {
            "encode": {
                "attn_type": ["encoder_only"], "dtype": ["bfloat16"], "head_dim": _FMHA_V2_WIDTHS[device.arch],
                "custom_scale": True, "host_lengths": BOTH_LENGTHS, "graph": ENCODER,
            }
        },
        tier=Tier.TUNED,
        rank=2,
        needs={"mma_sync", "tma"},
        requires=flashinfer_needs(device),
        pads={"head_dim"},
        bind=f"{KERNELS}.fmha_v2:bind",
        variants={"fmha_v2": EVERY_STEP},
    )  # fmt: skip


# ---- flashinfer_sinks ------------------------------------------------------------------------------------------------
# For those who name it: where no kernel above Triton claims sinks, Triton serves, and ``flashinfer`` stays refused
# (docs/adr/0010). Groups without sinks are refused, they have the kernels above. No LSE: that it holds the sink is in
# the kernels, but no test of FlashInfer's looks. No soft caps and no masks: the variant drops them.

_SINKS = {
    "dtype": HALF, "head_dims": [(64, 64), (128, 128)], "sinks": [True], "custom_scale": True, "sliding_window": True,
    "page_size": ANY, "kv_layout": ["NHD", "HND"], "native_out": True,
}  # fmt: skip
_SINKS_SOURCES = (
    "FI attention/_core.py:386-480 (BatchAttentionWithAttentionSinkWrapper; its binary's name lacks the width), "
    "jit/attention/variants.py, tests/attention/test_attention_sink.py"
)


def _sinks(device: Device) -> tuple[BackendSpec, ...]:
    portable: dict[str, Any] = {"tier": Tier.PORTABLE, "requires": flashinfer_needs(device)}
    fa2 = {**_SINKS, "deterministic": True}
    found = [
        *table(
            "flashinfer_sinks",
            _SINKS_SOURCES,
            {
                "prefill": {**fa2, "graph": NOT_CAPTURED},
                "decode": {**fa2, "graph": CAPTURED, "verify_width": ANY},
            },
            rank=61,
            needs={"mma_sync", "cp_async"},
            bind=f"{KERNELS}.flashinfer_sinks:bind",
            variants={"fa2": EVERY_STEP},
            **portable,
        )
    ]  # fmt: skip
    if device.arch == "sm_90":
        portable["requires"] = (*portable["requires"], cuda("12.3"))
        found += table(
            "flashinfer_sinks",
            _SINKS_SOURCES,
            {"prefill": {**_SINKS, "graph": NOT_CAPTURED}},
            rank=60,
            needs={"wgmma", "tma"},
            bind=f"{KERNELS}.flashinfer_sinks:bind_fa3",
            variants={"fa3": EVERY_STEP},
            **portable,
        )
    if device.arch in ("sm_120", "sm_121"):
        found += table(
            "flashinfer_sinks",
            "FI decode.py xqa_batch_decode_with_kv_cache (sinks); vLLM flashinfer.py (sinks where XQA serves)",
            {"decode": {**XQA, "sinks": [True]}},
            rank=60,
            bind=f"{KERNELS}.xqa:bind",
            variants={"xqa": EVERY_STEP},
            **portable,
        )
    return tuple(found)


def rows(device: Device) -> Iterable[BackendSpec]:
    """Rows of the kernels that exist for the device's architecture, and those that explain why they do not."""
    return (
        *_flashinfer(device),
        *(_encoders(device) if device.arch in CUTLASS_ARCHS else ()),
        *(_cudnn(device) if device.arch in CUDNN_ARCHS else ()),
        *(_fmha_v2(device) if device.arch in _FMHA_V2_WIDTHS else ()),
        *_sinks(device),
    )


RULES = tuple(
    Constraint(
        name=f"flashinfer-{role}-cross-window",
        when={role: "flashinfer", "attn_type": "cross"},
        then={"sliding_window": None},
        because="flashinfer plans cross attention without a window",
        evidence="SGLang flashinfer_backend.py (two wrappers, either window or cross)",
    )
    for role in ("prefill", "decode")
)
