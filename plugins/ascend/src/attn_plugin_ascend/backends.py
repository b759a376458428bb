"""What torch_npu's kernels promise on Ascend NPUs: one backend, ``ascend``, with other kernels on 310P.

Sources: torch-npu 2.10.0.post4 and its operator documents (op-plugin 517f2e7); vllm-ascend 182b75e; SGLang 0.5.23;
threads by repository and number. Only pages of 128: 16 passes the kernel's own check and corrupts (sglang issue 38196).
Refused: softcap, ALiBi, caches of other types than the model, token-sparse attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_core.domain import ANY, MultipleOf, OneOf
from attn_core.spec import BackendSpec, Constraint, Requirement, Tier

TORCH_NPU = Requirement(
    "torch-npu>=2.10",
    written_for="2.10.0.post4",
    symbols=("torch_npu.npu",),
    install="pip install torch-npu at torch's own version, on top of CANN",
)
ATB = Requirement(
    "torch-npu>=2.10",
    written_for="2.10.0.post4",
    symbols=("torch_npu.op_plugin.atb",),
    install="pip install torch-npu at torch's own version, on top of CANN and NNAL (libatb.so)",
)
ENCODER = OneOf("piecewise", "none", "decode")
"""Encoders are in no decode step, so graphs of those are no trouble."""
GRAPH = OneOf("decode", "piecewise", "none")
"""Of decode steps, the lengths in them renewed each step; never of prefill, whose number of queries would stay."""


def table(evidence: str, roles: Mapping[str, Mapping[str, Any]], **more: Any) -> tuple[BackendSpec, ...]:
    """One row per role: ``roles`` maps it to what it accepts, the rest holds for all of them."""
    return tuple(
        BackendSpec(
            platform="ascend", backend="ascend", role=role, accepts=accepts, evidence=evidence, tier=Tier.BEST, **more
        )
        for role, accepts in roles.items()
    )


# ---- fused infer attention (A2, A3, A5) ------------------------------------------------------------------------------
# Lengths are host lists, baked into a captured task: kernels/launches.py issues every launch again each step.

_FIA_ANY = {
    "dtype": ["bfloat16", "float16"], "device.arch": ["910b", "910c", "950"], "num_heads": MultipleOf(1, max=256),
    "group_size": MultipleOf(1, max=64), "custom_scale": True, "lse": True, "max_num_seqs": MultipleOf(1, max=4096),
}  # fmt: skip
_FIA_PAGED = {
    **_FIA_ANY, "attn_type": ["decoder", "cross"], "unequal_v": True,
    "head_dims": [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)], "sliding_window": True, "sinks": True,
    "page_size": [128], "kv_layout": ["NHD", "HND"], "graph": GRAPH,
}  # fmt: skip
_FIA_BIND = "attn_plugin_ascend.kernels.fia:bind"
_FIA = (
    "op-plugin npu_fused_infer_attention_score.md (widths, 64 queries a head, v2 learnable_sink); vllm-ascend "
    "attention_v1.py (page 128; graphs: full_graph_fia), issue 9632 (64, 128 and 192 in TND); SGLang ascend_backend.py "
    "(256/256, cross)"
)

# ---- MLA -------------------------------------------------------------------------------------------------------------
# Rotary and latent parts are separate tensors throughout. bfloat16: the engines convert float16 before the call.

_MLA_ANY = {
    "kind": "mla", "dtype": ["bfloat16"], "device.arch": ["910b", "910c"], "unequal_v": True, "custom_scale": True,
    "page_size": [128], "kv_layout": ["MLA_SPLIT"], "graph": GRAPH,
}  # fmt: skip

# ---- 310P ------------------------------------------------------------------------------------------------------------
# ATB's older kernels on caches in the NZ (fractal) format, which has its own writer. float16 only; no window, no sinks,
# no LSE. Key lengths are read on the device, so captured decode steps need nothing but fixed addresses.

_ATB = {
    "dtype": ["float16"], "device.arch": ["310p"], "head_dim": MultipleOf(16, min=16, max=128), "custom_scale": True,
    "page_size": [128], "kv_layout": ["ASCEND_NZ"], "max_num_seqs": MultipleOf(1, max=2048), "graph": GRAPH,
    "native_out": True,
}  # fmt: skip
_ATB_SOURCE = (
    "op-plugin _atb_api_docs.py (inference products: float16, batch up to 2048, NZ caches, widths of 16, page * width "
    "up to 128 * 128); vllm-ascend _310p/attention/attention_v1.py, _310p/model_runner_310p.py (graphs)"
)

ROWS = (
    *table(
        _FIA,
        {"prefill": _FIA_PAGED, "decode": {**_FIA_PAGED, "verify_width": MultipleOf(1, max=16)}},
        needs={"cube_bf16"},
        requires=(TORCH_NPU,),
        bind=_FIA_BIND,
    ),
    *table(
        f"{_FIA}; SGLang (encoder-only: sparse_mode 0, no mask)",
        {"encode": {**_FIA_ANY, "attn_type": ["encoder_only"], "head_dim": [64, 128, 192], "graph": ENCODER}},
        needs={"cube_bf16"},
        requires=(TORCH_NPU,),
        pads={"head_dim"},
        bind=_FIA_BIND,
    ),
    *table(
        "op-plugin npu_fused_infer_attention_score.md (192/128 unabsorbed, LSE allowed); vllm-ascend mla_v1.py",
        {"prefill": {**_MLA_ANY, "head_dims": [(192, 128)], "lse": True}},
        needs={"cube_bf16"},
        requires=(TORCH_NPU,),
        form="materialised",
        bind=_FIA_BIND,
    ),
    *table(
        "op-plugin npu_fused_infer_attention_score.md (512 + 64, power-of-two heads, no LSE); vllm-ascend mla_v1.py",
        {
            "decode": {
                **_MLA_ANY, "head_dims": [(576, 512)], "num_heads": [1, 2, 4, 8, 16, 32, 64, 128],
                "mla_query": "split", "verify_width": MultipleOf(1, max=16),
            }
        },
        needs={"cube_bf16"},
        requires=(TORCH_NPU,),
        form="absorbed",
        pads={"num_heads"},
        bind=_FIA_BIND,
    ),
    *table(
        "op-plugin npu_scatter_pa_kv_cache.md (cache_mode Norm); vllm-ascend attention_v1.py",
        {
            "kv_write": {
                "dtype": ["bfloat16", "float16"], "device.arch": ["910b", "910c", "950"], "head_dim": ANY,
                "unequal_v": True, "page_size": [128], "kv_layout": ["NHD"], "graph": GRAPH,
            }
        },
        needs={"cube_bf16"},
        requires=(TORCH_NPU,),
        bind="attn_plugin_ascend.kernels.kv_write:bind",
    ),
    *table(
        f"{_ATB_SOURCE}; op-plugin test_atb_paged_attention_splitfuse_v2.py (on 310P)",
        {"prefill": _ATB, "decode": {**_ATB, "verify_width": MultipleOf(1)}},
        needs={"cube"},
        requires=(ATB,),
        bind="attn_plugin_ascend.kernels.atb:bind",
    ),
    *table(
        "op-plugin ReshapeAndCachAtb.cpp (NZ by the cache's format); vllm-ascend device_op.py (310P)",
        {"kv_write": {k: v for k, v in _ATB.items() if k not in ("custom_scale", "max_num_seqs", "native_out")}},
        needs={"cube"},
        requires=(ATB,),
        bind="attn_plugin_ascend.kernels.kv_write:bind_nz",
    ),
)  # fmt: skip

RULES = tuple(
    Constraint(
        name=f"ascend-950-{role}-graph",
        when={role: "ascend", "device.arch": "950"},
        then={"graph": ["piecewise", "none"]},
        because="torch_npu documents the renewal of captured launches for A2 and A3 only",
        evidence="op-plugin torch_npu-npu-graph_task_group_begin.md (products)",
    )
    for role in ("decode", "prefill")
)
