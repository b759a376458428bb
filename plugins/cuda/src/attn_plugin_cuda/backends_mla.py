"""What the CUDA kernels promise for MLA (DeepSeek, Kimi), dense and token-sparse.

Two forms: *absorbed* runs on the latent cache, one key/value head of 576 against 512; *materialised* prefill attends
over expanded keys and values of the new tokens. Sources as in :mod:`attn_plugin_cuda.backends`, and FMLA: FlashMLA
9241ae3e; SFM: sgl-flash-mla 1.0.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attn_core.domain import ANY, Domain, MultipleOf, NoneOf
from attn_core.spec import BackendSpec, Device, Requirement, Tier
from attn_plugin_cuda.backends import (
    BOTH_LENGTHS,
    CAPTURED,
    CUTLASS_DSL,
    EVERY_STEP,
    FLASHINFER,
    HALF,
    KERNELS,
    NOT_CAPTURED,
    TRTLLM_GEN,
    cuda,
    flashinfer_needs,
    table,
)
from attn_plugin_cuda.backends_flash import FA3_SGL, FA3_UPSTREAM, FA3_VLLM
from attn_plugin_cuda.backends_flashinfer import (
    CUDNN_ARCHS,
    CUDNN_SOURCES,
    CUTLASS_ARCHS,
    CUTLASS_SOURCES,
    IN_ROOM,
    cudnn_needs,
)

FLASH_MLA = Requirement(
    "sgl-flash-mla>=1.0",
    written_for="1.0.0",
    symbols=("flash_mla.flash_mla_interface",),
    install="pip install sgl-flash-mla; flash-mla itself dropped Hopper and these cache formats on 2026-09-30",
)
VLLM_MLA = Requirement(
    "vllm>=0.30",
    written_for="0.33.0",
    symbols=("vllm._flashmla_extension_C",),
    install="pip install vllm (for its FlashMLA)",
)
VLLM = Requirement(
    "vllm>=0.30", written_for="0.33.0", symbols=("vllm._custom_ops",), install="pip install vllm (for its CUTLASS MLA)"
)

_EXPANDED = {
    "kind": "mla", "dtype": HALF, "unequal_v": True, "custom_scale": True, "lse": True,
    "kv_layout": ["MLA", "MLA_SPLIT"], "kv_cache_dtype": ["auto", "fp8_e4m3"], "page_size": ANY,
    "graph": NOT_CAPTURED,
}  # fmt: skip
"""Materialised prefill: it reads no cache, so that is whatever decode and its writer agree on."""
_LATENT = {
    "kind": "mla", "dtype": HALF, "unequal_v": True, "custom_scale": True, "kv_layout": ["MLA"],
    "head_dims": [(576, 512)], "graph": CAPTURED,
}  # fmt: skip
_PACKED = {**_LATENT, "mla_query": "packed"}
_EITHER = {**_LATENT, "mla_query": ["packed", "split"]}
_EXPANDED_512 = {**_EXPANDED, "head_dims": [(192, 128), (256, 256)]}
_FILLS = {"native_out": True}
_MATERIALISED: dict[str, Any] = {"form": "materialised"}
_ABSORBED: dict[str, Any] = {"form": "absorbed"}

# ---- flashinfer ------------------------------------------------------------------------------------------------------

_FI_FAVOURED = frozenset({"sm_90", "sm_100", "sm_103", "sm_120", "sm_121"})
"""Where engines let FlashInfer serve MLA; elsewhere it stands behind Triton, for those who name it."""
_FI_RAGGED = "FI BatchPrefillWithRaggedKVCacheWrapper (192/128); SGLang flashinfer_mla_backend.py"
_FI_LATENT = "FI mla/_batch_mla/_backends/_capabilities.py; sglang PR 18758 (SM12x: flashinfer before triton)"


def _flashinfer(device: Device) -> tuple[BackendSpec, ...]:
    favoured = device.arch in _FI_FAVOURED
    requires, rank = flashinfer_needs(device), 0 if favoured else 50
    more: dict[str, Any] = {
        "tier": Tier.TUNED if favoured else Tier.PORTABLE, "needs": {"mma_sync", "cp_async"},
    }  # fmt: skip
    decode = {
        **_EITHER, "head_dims": [(576, 512), (320, 256)], "page_size": ANY, "lse": True, "native_out": True,
        "verify_width": ANY, "device.shared_memory_per_block": MultipleOf(1, min=92672),
    }  # fmt: skip
    prefill = {**_EXPANDED, "head_dims": [(192, 128), (128, 128), (256, 256)], "logit_softcap": True, **_FILLS}
    hopper: tuple[BackendSpec, ...] = ()
    if device.arch == "sm_90":  # where flashinfer's fa3 kernel runs; fp8 caches go through it alone
        hopper = table(
            "flashinfer",
            f"{_FI_LATENT}; FI _fa_common.py (fp8 on SM90 with latent 512)",
            {"decode": {**decode, "kv_cache_dtype": ["auto", "fp8_e4m3"]}},
            requires=(*requires, cuda("12.3")),
            rank=rank - 1,
            bind=f"{KERNELS}.flashinfer_mla:bind_fa3",
            variants={"fa3": EVERY_STEP},
            **_ABSORBED,
            **{**more, "needs": {*more["needs"], "wgmma"}},
        )
    return (
        *_flashinfer_blackwell(device, more["tier"], rank),
        *table(
            "flashinfer",
            _FI_RAGGED,
            {"prefill": prefill},
            requires=requires,
            rank=rank,
            bind=f"{KERNELS}.flashinfer:bind",
            variants={"fa2": EVERY_STEP},
            **_MATERIALISED,
            **more,
        ),
        *hopper,
        *table(
            "flashinfer",
            _FI_LATENT,
            {"decode": decode},
            requires=requires,
            rank=rank,
            bind=f"{KERNELS}.flashinfer_mla:bind",
            variants={"fa2": EVERY_STEP},
            **_ABSORBED,
            **more,
        ),
    )


def _flashinfer_blackwell(device: Device, tier: Tier, rank: int) -> tuple[BackendSpec, ...]:
    """Materialised prefill by cuDNN and CUTLASS, ahead of fa2 as in FlashInfer's own rule."""
    if device.arch not in CUTLASS_ARCHS:
        return ()
    pairs = [(192, 128), (128, 128)]
    more: dict[str, Any] = {"tier": tier, "needs": {"tcgen05", "tmem"}, **_MATERIALISED}
    cudnn: tuple[BackendSpec, ...] = ()
    if device.arch in CUDNN_ARCHS:
        cudnn = table(
            "flashinfer",
            CUDNN_SOURCES,
            {"prefill": {**_EXPANDED, "head_dims": [*pairs, (256, 256)], "group_size": [1]}},
            rank=rank - 2,
            requires=cudnn_needs(device),
            bind=f"{KERNELS}.flashinfer:bind_cudnn",
            variants={"cudnn": EVERY_STEP},
            **more,
        )
    return (
        *cudnn,
        *table(
            "flashinfer",
            f"{CUTLASS_SOURCES}; attention/blackwell (zeros and -inf where a row has no keys)",
            {"prefill": {**_EXPANDED, "head_dims": pairs}},
            rank=rank - 1,
            requires=flashinfer_needs(device),
            bind=f"{KERNELS}.flashinfer:bind_cutlass",
            variants=IN_ROOM,
            **more,
        ),
    )


# ---- fa3 -------------------------------------------------------------------------------------------------------------


def _fa3(evidence: str, of: dict[str, Any], page_size: Domain, /, **more: Any) -> tuple[BackendSpec, ...]:
    captured = {"graph": CAPTURED, "host_lengths": BOTH_LENGTHS, **more}
    decode = {
        **_EITHER, **captured, "page_size": page_size, "kv_cache_dtype": ["auto"], "lse": True, "verify_width": ANY,
        "kv_offload_io": NoneOf("kernel"),
    }  # fmt: skip
    return (
        *table(
            "fa3",
            f"{evidence}; FA hopper/ (192/128); SGLang flashattention_backend.py (MLA prefill expanded)",
            {"prefill": {**_EXPANDED_512, **captured}},
            **_MATERIALISED,
            **of,
        ),
        *table(
            "fa3",
            f"{evidence} (qv: rope <= 64, latent >= 256, 16 bit, SM90); sglang PR 23139 (KV offload)",
            {"decode": decode},
            **_ABSORBED,
            **of,
        ),
    )


_FA3 = (
    *_fa3("SK sgl_kernel/flash_attn.py", FA3_SGL, ANY, **_FILLS),
    *_fa3("vLLM 0.33.0 flashattn_mla.py, mla/prefill/flash_attn.py", FA3_VLLM, MultipleOf(16), **_FILLS),
    *_fa3("FA hopper/flash_attn_interface.py", FA3_UPSTREAM, ANY),
)

# ---- flashmla, cutlass_mla -------------------------------------------------------------------------------------------
# Decode kernels. Their names stand for a whole backend in engines, where FlashInfer's ragged kernel prefills.

_BEHIND: dict[str, Any] = {"tier": Tier.TUNED, "rank": 30}
_RAGGED_FI: dict[str, Any] = {**_MATERIALISED, "bind": f"{KERNELS}.flashinfer:bind"}
_FLASHMLA_LATENT = {
    **_PACKED, "page_size": [64], "lse": True, "verify_width": ANY, "host_lengths": BOTH_LENGTHS,
    "device.arch": ["sm_90"],
}  # fmt: skip
_FLASHMLA_ROW: dict[str, Any] = {"needs": {"wgmma", "tma"}, "tier": Tier.TUNED, **_ABSORBED}
_FLASHMLA_FP8 = {**_FLASHMLA_LATENT, "dtype": ["bfloat16"], "kv_cache_dtype": ["fp8_e4m3"]}
_FLASHMLA_SOURCES = (
    "FMLA README (dense decode on SM90, page 64); vLLM v1/attention/ops/flashmla.py; SFM flash_mla/_loader.py"
)
_DESCALES = "vllm-project/FlashMLA 46d64a8e csrc/extension/sm90/dense_fp8/pybind.cpp (descales (1,), bfloat16 out)"


def _flashmla_prefill(package: Requirement, rank: int) -> tuple[BackendSpec, ...]:
    return table(
        "flashmla",
        f"SGLang flashmla_backend.py (prefill is FlashInfer's); {_FI_RAGGED}",
        {"prefill": {**_EXPANDED_512, **_FILLS}},
        needs={"wgmma"},
        requires=(FLASHINFER, package),
        tier=Tier.TUNED,
        rank=rank,
        **_RAGGED_FI,
    )


_FLASHMLA = (
    *_flashmla_prefill(FLASH_MLA, 30),
    *_flashmla_prefill(VLLM_MLA, 32),
    *table(
        "flashmla",
        _FLASHMLA_SOURCES,
        {"decode": _FLASHMLA_LATENT},
        requires=(FLASH_MLA, cuda("12.8")),
        bind=f"{KERNELS}.flashmla:bind",
        rank=30,
        **_FLASHMLA_ROW,
    ),
    # 8-bit caches rank behind, so that they are asked for.
    *table(
        "flashmla",
        f"{_FLASHMLA_SOURCES}; SFM flash_mla_interface.py, _C_legacy (descales of shape (1)); {_DESCALES}",
        {"decode": _FLASHMLA_FP8},
        requires=(FLASH_MLA, cuda("12.8")),
        bind=f"{KERNELS}.flashmla:bind",
        rank=31,
        **_FLASHMLA_ROW,
    ),
    *table(
        "flashmla",
        f"vLLM 0.33.0 v1/attention/ops/flashmla.py, mla/flashmla.py (_k_scale.reshape(1)); {_DESCALES}",
        {"decode": _FLASHMLA_FP8},
        requires=(VLLM_MLA, cuda("12.8")),
        bind=f"{KERNELS}.flashmla:bind_vllm",
        rank=32,
        **_FLASHMLA_ROW,
    ),
)
_CUTLASS = (
    *table(
        "cutlass_mla",
        f"SGLang cutlass_mla_backend.py (prefill is FlashInfer's); {_FI_RAGGED}",
        {"prefill": {**_EXPANDED_512, **_FILLS}},
        needs={"tcgen05", "tmem", "sm_100f"},
        requires=(FLASHINFER, cuda("12.8")),
        **_BEHIND,
        **_RAGGED_FI,
    ),
    # vLLM's op takes the model's scale; FlashInfer's own is fixed to 1/sqrt(192), which YaRN models do not have.
    *table(
        "cutlass_mla",
        "vLLM cutlass_mla.py:65 (128 heads, others padded), torch.ops._C.sm100_cutlass_mla_decode (major 10, page 128)",
        {
            "decode": {
                **_EITHER, "page_size": [128], "kv_cache_dtype": ["auto", "fp8_e4m3"], "lse": True,
                "num_heads": [128], **_FILLS,
            }
        },
        needs={"tcgen05", "tmem", "sm_100f"},
        requires=(VLLM, cuda("12.8")),
        pads={"num_heads"},
        bind=f"{KERNELS}.cutlass_mla:bind",
        **_BEHIND,
        **_ABSORBED,
    ),
)  # fmt: skip

# ---- trtllm_mla, cutedsl_mla -----------------------------------------------------------------------------------------

_TRTLLM_RAGGED = "FI trtllm_ragged_attention_deepseek; vLLM TRTLLM_RAGGED (192/128 and 256/256 on major 10)"
_TRTLLM_LATENT = {
    **_PACKED, "page_size": [64, 32], "kv_cache_dtype": ["auto", "fp8_e4m3"], "nope_dim": [128],
    "verify_width": ANY, "host_lengths": BOTH_LENGTHS, **_FILLS,
}  # fmt: skip
_TRTLLM_GEN_NAMED = {"trtllm-gen": EVERY_STEP}
_TRTLLM = (
    *table(
        "trtllm_mla",
        f"{_TRTLLM_RAGGED}; sglang PR 18758 (SM12x has no such kernel)",
        {"prefill": {**_EXPANDED_512, **_FILLS}},
        tier=Tier.BEST,
        needs=TRTLLM_GEN,
        requires=(FLASHINFER, cuda("12.8")),
        bind=f"{KERNELS}.trtllm_mla:bind",
        variants=_TRTLLM_GEN_NAMED,
        **_MATERIALISED,
    ),
    *table(
        "trtllm_mla",
        "FI trtllm_batch_decode_with_kv_cache_mla, _capabilities.py (pages 32 and 64, heads not between 64 and 128)",
        {"decode": {**_TRTLLM_LATENT, "dtype": ["bfloat16"], "num_heads": [128, 64, 32, 16, 8, 4, 2, 1]}},
        tier=Tier.BEST,
        needs=TRTLLM_GEN,
        requires=(FLASHINFER, cuda("12.8")),
        bind=f"{KERNELS}.trtllm_mla:bind",
        variants=_TRTLLM_GEN_NAMED,
        **_ABSORBED,
    ),
)
_CUTEDSL = (
    *table(
        "cutedsl_mla",
        f"SGLang cutedsl_mla (prefill becomes trtllm_mla); {_TRTLLM_RAGGED}",
        {"prefill": {**_EXPANDED_512, **_FILLS}},
        tier=Tier.BEST,
        rank=10,
        needs=TRTLLM_GEN,
        requires=(FLASHINFER, cuda("12.8")),
        bind=f"{KERNELS}.trtllm_mla:bind_cutedsl",
        variants=_TRTLLM_GEN_NAMED,
        **_MATERIALISED,
    ),
    *table(
        "cutedsl_mla",
        "FI _capabilities.py (cute-dsl-monolithic: 10.0, 10.3, 10.7); SGLang (decode only, pages 32 and 64)",
        {"decode": {**_TRTLLM_LATENT, "lse": True}},
        tier=Tier.BEST,
        rank=10,
        needs=TRTLLM_GEN,
        requires=(FLASHINFER, CUTLASS_DSL, cuda("12.8")),
        bind=f"{KERNELS}.trtllm_mla:bind_cutedsl",
        variants={"cute-dsl, monolithic": EVERY_STEP},
        **_ABSORBED,
    ),
)

# ---- dsa -------------------------------------------------------------------------------------------------------------
# FlashMLA's sparse kernels, Hopper and the sm_100 family. The fp8 cache has 656 bytes a token and its own writer; both
# kernels can serve it (flashmla_sparse after dequantising what it gathers), so each step's plan takes the cheaper one.

_DSA = {
    **_PACKED, "sparse": "dsa", "dtype": ["bfloat16"], "topk": MultipleOf(128), "num_heads": [64, 128],
    "page_size": [64], "lse": True, "device.arch": ["sm_90", "sm_100", "sm_103"],
}  # fmt: skip
_DSA_FP8 = {**_DSA, "kv_layout": ["DSA_FP8"], "kv_cache_dtype": ["fp8_e4m3"]}
_DSA_BF16 = {**_DSA, "kv_cache_dtype": ["auto"]}
_DSA_ROW: dict[str, Any] = {
    "tier": Tier.BEST, "requires": (FLASH_MLA, cuda("12.8")), "bind": f"{KERNELS}.dsa:bind", **_ABSORBED,
}  # fmt: skip
_DSA_TABLE = (
    *table(
        "dsa",
        "FMLA README (sparse prefill and decode, SM90 and SM100, 656-byte rows); SGLang dsa backend (choice per step); "
        "vLLM flashmla_sparse.py (64 or 128 heads, others padded; page 64)",
        {"prefill": {**_DSA_FP8, "graph": NOT_CAPTURED}, "decode": {**_DSA_FP8, "verify_width": ANY}},
        variants={
            "flashmla_sparse": "total_kv_tokens < 512 * total_q_tokens",
            "flashmla_kv": "otherwise",
        },
        pads={"num_heads"},
        **_DSA_ROW,
    ),
    *table(
        "dsa",
        "FMLA flash_mla_sparse_fwd (bf16 rows); SGLang dsa backend (bf16 cache: flashmla_sparse)",
        {"prefill": {**_DSA_BF16, "graph": NOT_CAPTURED}, "decode": {**_DSA_BF16, "verify_width": ANY}},
        variants={"flashmla_sparse": "every step: flashmla_kv reads fp8 caches only"},
        pads={"num_heads"},
        rank=10,
        **_DSA_ROW,
    ),
    *table(
        "dsa",
        "vLLM concat_and_cache_mla (fp8_ds_mla: 512 fp8 values, 4 scales, 64 bf16 values a token)",
        {
            "kv_write": {
                "kind": "mla", "dtype": ["bfloat16"], "head_dims": [(576, 512)], "unequal_v": True, "page_size": [64],
                "kv_layout": ["DSA_FP8"], "kv_cache_dtype": ["fp8_e4m3"], "mla_query": ["packed", "split"],
                "graph": CAPTURED, "device.arch": ["sm_90", "sm_100", "sm_103"],
            }
        },
        **_DSA_ROW,
    ),
)  # fmt: skip


def rows(device: Device) -> Iterable[BackendSpec]:
    """Every row, whether or not the device can run it: the core explains why not."""
    return (*_flashinfer(device), *_FA3, *_FLASHMLA, *_CUTLASS, *_TRTLLM, *_CUTEDSL, *_DSA_TABLE)
