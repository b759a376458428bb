"""What the kernels for Intel GPUs (``intel_xpu``) and for AMX (``intel_amx``) promise.

Sources: vllm-xpu-kernels 0.1.16.2 (4543b58); SGLang 0.5.23 and its CPU kernels. Refused on XPU: widths that were not
compiled, which the library silently replaces by a PyTorch reference; MLA, cross attention. Refused on AMX: encoders and
cross attention (the kernels' argument list has changed three times over them), LSE.
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
# No symbols: the CUDA, ROCm and XPU builds of sgl_kernel have the same modules, so only the name tells.
AMX_KERNELS = Requirement(
    "sglang-kernel-cpu>=0.4",
    written_for="0.4.2.post1",
    install="build sgl-kernel for CPUs from SGLang's repository (pyproject_cpu.toml)",
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

_XPU_ANY = {
    "dtype": HALF, "device.arch": ["bmg", "lnl", "ptl"], "head_dim": [64, 96, 128, 192], "custom_scale": True,
    "logit_softcap": True, "lse": True,
}  # fmt: skip
_XPU_PAGED = {
    **_XPU_ANY, "sliding_window": True, "sinks": True, "alibi": True, "page_size": [64],
    "kv_cache_dtype": ["auto", "fp8_e4m3", "fp8_e5m2"], "host_lengths": ["exact", "bounds"],
}  # fmt: skip
_XPU_SOURCE = (
    "vllm-xpu-kernels csrc/flash_attn/flash_api.cpp, csrc/xpu/attn/kernel_configs (Xe2 and Xe3; widths 64, 96, 128, "
    "192), flash_attn_interface.py (s_aux); vLLM flash_attn.py (pages)"
)

XPU = (
    *table(
        "xpu",
        "intel_xpu",
        _XPU_SOURCE,
        {"encode": {**_XPU_ANY, "attn_type": ["encoder_only"], "graph": ["piecewise", "none", "decode"]}},
        needs={"xmx"},
        requires=(XPU_KERNELS,),
        pads={"head_dim"},
    ),
    *table(
        "xpu",
        "intel_xpu",
        _XPU_SOURCE,
        {"prefill": _XPU_PAGED, "decode": {**_XPU_PAGED, "verify_width": MultipleOf(1, max=16)}},
        needs={"xmx"},
        requires=(XPU_KERNELS,),
    ),
)

# ---- AMX -------------------------------------------------------------------------------------------------------------
# Token tables, hence pages of one token. Widths in whole tiles.

_AMX_ANY = {"dtype": HALF, "custom_scale": True, "page_size": [1]}
_AMX_MHA = {
    **_AMX_ANY, "head_dim": MultipleOf(32, max=256), "sliding_window": True, "logit_softcap": True, "sinks": True,
}  # fmt: skip
_AMX_MLA = {**_AMX_ANY, "kind": "mla", "dtype": ["bfloat16"], "unequal_v": True, "kv_layout": ["MLA"]}
_AMX_SOURCE = (
    "SGLang intel_amx_backend.py, torch.ops.sgl_kernel.decode_attention_cpu and extend_attention_cpu; "
    "vLLM cpu_attn.py (AMX_MLA: bfloat16, 576)"
)
_AMX: dict[str, Any] = {"needs": {"amx_tile", "amx_bf16"}, "requires": (AMX_KERNELS,)}

CPU = (
    *table("cpu", "intel_amx", _AMX_SOURCE, {"prefill": _AMX_MHA, "decode": _AMX_MHA}, **_AMX),
    *table(
        "cpu",
        "intel_amx",
        _AMX_SOURCE,
        {"prefill": {**_AMX_MLA, "head_dims": [(192, 128)]}},
        form="materialised",
        **_AMX,
    ),
    *table(
        "cpu",
        "intel_amx",
        _AMX_SOURCE,
        {"decode": {**_AMX_MLA, "head_dims": [(576, 512)]}},
        form="absorbed",
        **_AMX,
    ),
)
