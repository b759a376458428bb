"""Linear position bias (ALiBi): BLOOM, MPT, Falcon with ``alibi``, Baichuan 13B."""

from __future__ import annotations

import math
from dataclasses import replace

from attn_core.errors import BadInputError
from attn_core.models.layers import collect
from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec, Group


def slopes(heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """Slopes of Press et al. (2021), "Train Short, Test Long": 2^(-bias_max*k/n) for k = 1..n, n a power of two.

    For other counts, the slopes of the nearest power of two below, then every second one of twice as many heads.
    """
    n = 2 ** math.floor(math.log2(heads))
    own = [2.0 ** (-bias_max * k / n) for k in range(1, n + 1)]
    between = [2.0 ** (-bias_max * k / (2 * n)) for k in range(1, 2 * n + 1, 2)]
    return tuple(own + between[: heads - n])


def read(v: View) -> dict[str, Group]:
    """One group ``full``; sizes from each model's own fields."""
    spec = {"bloom": _bloom, "mpt": _mpt, "falcon": _falcon, "baichuan": _baichuan}[v.kind](v)
    return collect((i, "full", spec) for i in range(v.layers))


def _bloom(v: View) -> AttentionSpec:
    heads = v.size("num_attention_heads")
    return AttentionSpec(num_heads=heads, head_dim=v.head_dim, dtype=v.dtype, alibi_slopes=slopes(heads))


def _mpt(v: View) -> AttentionSpec:
    # ``attn_config`` nests the details; Source: MptAttentionConfig, build_mpt_alibi_tensor.
    own = View(v.sub("attn_config") or {}, kind="mpt", parent=v)
    heads = v.size("num_attention_heads")
    if own.flag("prefix_lm"):
        raise BadInputError(f"{v.architecture}: attn_config.prefix_lm is not supported")
    if own.get("attn_type") == "multiquery_attention":
        kv = 1
    else:
        kv = own.size("kv_n_heads", heads)
    alibi = own.flag("alibi", True)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=v.head_dim,
        dtype=v.dtype,
        scale=own.get("softmax_scale"),
        alibi_slopes=slopes(heads, own.size("alibi_bias_max", 8)) if alibi else None,
    )


def _falcon(v: View) -> AttentionSpec:
    heads = v.size("num_attention_heads")
    if v.flag("new_decoder_architecture"):
        kv = v.size("num_key_value_heads", heads)
    else:
        kv = 1 if v.flag("multi_query", True) else heads
    width = v.head_dim
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv, head_dim=width, dtype=v.dtype)
    if not v.flag("alibi"):
        return spec
    # Falcon adds the bias before it multiplies by 1/sqrt(head_dim), so the bias is scaled too.
    return replace(spec, alibi_slopes=tuple(s * width**-0.5 for s in slopes(heads)))


def _baichuan(v: View) -> AttentionSpec:
    # No field tells: the 7B models (hidden size 4096) rotate, the 13B models use ALiBi. Source: vLLM's baichuan.py.
    heads, hidden = v.size("num_attention_heads"), v.size("hidden_size")
    bias = slopes(heads) if hidden != 4096 else None
    return AttentionSpec(num_heads=heads, head_dim=v.head_dim, dtype=v.dtype, alibi_slopes=bias)
