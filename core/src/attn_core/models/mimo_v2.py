"""MiMo-V2: own heads and sinks per kind of layer, v narrower than q and k, and its MTP draft layers."""

from __future__ import annotations

from dataclasses import replace

from attn_core.errors import BadInputError
from attn_core.models import dense
from attn_core.models.layers import collect, names
from attn_core.models.view import View
from attn_core.spec import check
from attn_core.spec.model import AttentionSpec, Group

FULL, SWA = "add_full_attention_sink_bias", "add_swa_attention_sink_bias"


def read(v: View) -> dict[str, Group]:
    """Groups ``full`` and ``sliding``; ``hybrid_layer_pattern`` marks sliding layers with 1.

    ``attention_value_scale`` multiplies v before the cache, outside the kernel. Source: ``modeling_mimo_v2_flash.py``.
    """
    base = dense.attention(v)
    specs: dict[str, Group] = {
        "full": replace(base, sinks=base.sinks or _sinks(v, FULL)),
        "sliding": _sliding(v, base, base.sinks or _sinks(v, SWA)),
    }
    return collect((i, name, specs[name]) for i, name in enumerate(_names(v)))


def read_mtp(v: View) -> dict[str, Group]:
    """The draft layers, all built with the sliding configuration. Source: ``MiMoV2MTPLayer`` in SGLang and vLLM.

    Either sink flag counts, so that a draft is never bound to kernels its target was refused for.
    """
    base = dense.attention(v)
    spec = _sliding(v, base, base.sinks or _sinks(v, SWA) or _sinks(v, FULL))
    return collect((i, "sliding", spec) for i in range(v.size("num_nextn_predict_layers", 1)))


def _sliding(v: View, base: AttentionSpec, sinks: bool) -> AttentionSpec:
    # The class default doubles the kv heads; checkpoints state them.
    width, value = v.size("swa_head_dim", base.head_dim), v.size("swa_v_head_dim", base.v_head_dim)
    return replace(
        base,
        num_heads=v.size("swa_num_attention_heads", base.num_heads),
        num_kv_heads=v.size("swa_num_key_value_heads", base.num_kv_heads * 2),
        head_dim=width,
        v_head_dim=value,
        sliding_window=_window(v),
        sinks=sinks,
    )


def _window(v: View) -> int:
    """``sliding_window_size`` counts the previous tokens, so the window has one more: MiMoV2FlashConfig and SGLang.

    ``attention_chunk_size`` is a further name for it.
    """
    for name in ("sliding_window", "attention_chunk_size"):
        v.get(name)
    if v.data.get("sliding_window_size") is not None:
        return int(check.size(v.name, "sliding_window_size", v.data["sliding_window_size"])) + 1
    return v.size("sliding_window")


def _names(v: View) -> list[str]:
    pattern = v.get("hybrid_layer_pattern")
    if pattern is None:
        v.need("layer_types")
        return names(v.but(attention_chunk_size=None), "full", "sliding")
    marks = v.indices("hybrid_layer_pattern")
    if len(marks) != v.layers or not set(marks) <= {0, 1}:
        raise BadInputError(f"{v.name}: hybrid_layer_pattern must hold 0 or 1 for each of {v.layers} layers: {pattern}")
    return ["sliding" if mark else "full" for mark in marks]


def _sinks(v: View, name: str) -> bool:
    """A sink flag. transformers' own class has none, and always learns sinks in sliding layers."""
    value = v.get(name)
    if value is None:
        of_transformers = v.get("hybrid_layer_pattern") is None and v.get(FULL) is None and v.get(SWA) is None
        return name == SWA and of_transformers
    return check.flag(v.name, name, value)
