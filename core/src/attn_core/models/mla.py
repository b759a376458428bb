"""Multi-head latent attention: DeepSeek V2/V3/V3.2, Kimi K2, GLM-5, and others with a ``kv_lora_rank``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec


def attention(v: View) -> AttentionSpec:
    """The latent attention of a layer; with ``index_topk`` each query reads that many tokens (DSA)."""
    if v.kind == "minicpm3" and v.get("v_head_dim") is None:
        v = v.but(v_head_dim=v.but(head_dim=None).head_dim)  # MiniCPM3Config: hidden_size over heads
    v.need("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    nope, rope = v.size("qk_nope_head_dim"), v.count("qk_rope_head_dim")
    topk = v.get("index_topk")
    # Stated, but no kernel's business: every query head has its own expanded key, whatever these say.
    for name in ("num_key_value_heads", "head_dim", "qk_head_dim", "q_lora_rank", "index_n_heads", "index_head_dim"):
        v.get(name)
    return AttentionSpec(
        kind="mla",
        num_heads=v.size("num_attention_heads"),
        head_dim=nope + rope,
        v_head_dim=v.size("v_head_dim"),
        latent_dim=v.size("kv_lora_rank"),
        rope_dim=rope,
        nope_dim=nope,
        dtype=v.dtype,
        scale=yarn_scale(v, nope + rope),
        sparse="none" if topk is None else "dsa",
        topk=None if topk is None else v.size("index_topk"),
    )


def yarn_scale(v: View, width: int) -> float | None:
    """1/sqrt(width) times the square of YaRN's ``mscale``; None without it.

    ``mscale = 0.1 * mscale_all_dim * ln(factor) + 1`` for a factor above 1. Source: ``yarn_get_mscale`` and
    ``yarn_apply_mscale`` in transformers' ``modeling_deepseek_v3.py``; DeepSeek's own ``softmax_scale`` is the same.
    """
    rope = v.get("rope")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) in ("default", None):
        return None
    all_dim, factor = rope.get("mscale_all_dim"), rope.get("factor")
    if not all_dim:
        return None
    for name, value in (("mscale_all_dim", all_dim), ("factor", factor)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInputError(f"{v.name}: rope {name}={value!r} must be a number")
    return float(width**-0.5 * _mscale(factor, all_dim) ** 2)


def _mscale(factor: Any, all_dim: Any) -> float:
    return 1.0 if factor <= 1 else 0.1 * all_dim * math.log(factor) + 1.0
