"""What the kernels for Intel GPUs promise: ``intel_xpu``, from vllm-xpu-kernels 0.1.16.2 (4543b58), and for MLA from
sgl-kernel-xpu (0742c77).

Refused: widths that were not compiled, which the library silently replaces by a PyTorch reference; soft caps and alibi,
which it takes and does not hand to its kernels; windows of encoders, cross attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_core.domain import MultipleOf
from attn_core.spec import BackendSpec, Requirement, Tier

HALF = ["bfloat16", "float16"]

XPU_KERNELS = Requirement(
    "vllm-xpu-kernels>=0.1.16",
    written_for="0.1.16.2",
    symbols=("vllm_xpu_kernels.flash_attn_interface",),
    install="pip install vllm-xpu-kernels, with the torch build for XPU and Intel's Level Zero driver",
)


def table(
    platform: str, backend: str, evidence: str, roles: Mapping[str, Mapping[str, Any]], **more: Any
) -> tuple[BackendSpec, ...]:
    """One row per role: ``roles`` maps it to what it accepts, the rest holds for all of them."""
    return tuple(
        BackendSpec(
            platform=platform, backend=backend, role=role, accepts=accepts, evidence=evidence, tier=Tier.BEST, **more
        )
        for role, accepts in roles.items()
    )


# ---- XPU -------------------------------------------------------------------------------------------------------------

_XPU_ANY: dict[str, Any] = {
    "dtype": HALF, "device.arch": ["bmg", "lnl", "ptl"], "head_dim": [64, 96, 128, 192], "custom_scale": True,
    "lse": True, "native_out": True,
}  # fmt: skip
_XPU_PAGED = {
    **_XPU_ANY, "sliding_window": True, "sinks": True, "page_size": [64],
    "kv_cache_dtype": ["auto", "fp8_e4m3", "fp8_e5m2"], "host_lengths": ["exact", "bounds"],
}  # fmt: skip
_XPU_SOURCE = (
    "vllm-xpu-kernels 0.1.16.2 flash_attn_interface.py, csrc/flash_attn/flash_api.cpp (what its kernels are given: "
    "symbols of _vllm_fa2_C.abi3.so), csrc/xpu/attn/kernel_configs (Xe2 and Xe3; widths 64, 96, 128, 192); vLLM "
    "flash_attn.py (pages); stand-in: tests/plugins_intel/test_intel_xpu.py"
)
_XPU: dict[str, Any] = {
    "needs": {"xmx"}, "requires": (XPU_KERNELS,), "bind": "attn_plugin_intel.kernels.intel_xpu:bind",
}  # fmt: skip

# MLA on the latent cache, for prefill too: the library has no kernel over expanded keys of 192 against 128.
SGL_KERNEL_XPU = Requirement(
    "sglang-kernel-xpu>=0.1",
    written_for="0.4.0",
    symbols=("sgl_kernel.attention",),
    install="build sgl-project/sgl-kernel-xpu for torch's XPU build; its distribution is sglang-kernel-xpu",
)
_LATENT: dict[str, Any] = {
    "kind": "mla", "dtype": HALF, "device.arch": ["bmg", "lnl"], "head_dims": [(576, 512)], "unequal_v": True,
    "num_heads": [16, 32, 64, 128], "custom_scale": True, "kv_layout": ["MLA"], "mla_query": ["split", "packed"],
    "page_size": [64, 128, 32, 16],
}  # fmt: skip

XPU = (
    *table(
        "xpu",
        "intel_xpu",
        "sgl-kernel-xpu 0742c77 python/sgl_kernel/attention.py, src/sycl/mla_decode.cpp (Xe2; pages), "
        "tests/test_flash_mla_decode.py, test_flash_mla_prefill.py (heads, contexts); SGLang intel_xpu (MLA)",
        {"prefill": _LATENT, "decode": _LATENT},
        needs={"xmx", "xe2"},
        requires=(SGL_KERNEL_XPU,),
        bind="attn_plugin_intel.kernels.intel_xpu_mla:bind",
        form="absorbed",
        pads={"num_heads"},
    ),
    *table(
        "xpu",
        "intel_xpu",
        _XPU_SOURCE,
        {"encode": {**_XPU_ANY, "attn_type": ["encoder_only"], "graph": ["piecewise", "none", "decode"]}},
        pads={"head_dim"},
        **_XPU,
    ),
    *table(
        "xpu",
        "intel_xpu",
        _XPU_SOURCE,
        {"prefill": _XPU_PAGED, "decode": {**_XPU_PAGED, "verify_width": MultipleOf(1, max=16)}},
        **_XPU,
    ),
)
