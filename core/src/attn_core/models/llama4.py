"""Llama 4: layers with rotation see their own chunk, layers without see everything."""

from __future__ import annotations

from attn_core.models import dense
from attn_core.models.layers import collect
from attn_core.models.view import View
from attn_core.spec.model import Group


def read(v: View) -> dict[str, Group]:
    """Groups ``chunked`` and ``full``, by ``layer_types``, ``no_rope_layers`` (1 = rotates) or the interval.

    Temperature tuning of the full layers scales q outside the kernel. Source: ``Llama4TextConfig``.
    """
    for outside in ("attn_scale", "attn_temperature_tuning", "no_rope_layers"):
        v.get(outside)
    n = v.layers
    if v.get("layer_types") is None:
        every = v.size("no_rope_layer_interval", 4)
        rotates = v.indices("no_rope_layers") if v.get("no_rope_layers") else [(i + 1) % every for i in range(n)]
        v = v.but(layer_types=["chunked_attention" if r else "full_attention" for r in rotates[:n]])
    if v.get("attention_chunk_size") is None:
        spec = dense.attention(v)
        return collect((i, "full", spec) for i in range(n))
    return dense.read(v)
