"""Llama 3.2 Vision: some decoder layers attend to the image instead of the text."""

from __future__ import annotations

from dataclasses import replace

from attn_core.errors import BadInputError
from attn_core.models import dense
from attn_core.models.layers import collect
from attn_core.models.view import View
from attn_core.spec.model import Group


def read(v: View) -> dict[str, Group]:
    """Groups ``full`` and ``cross``; a cross layer has no self-attention. Source: ``MllamaTextModel``."""
    base, n = dense.attention(v), v.layers
    cross = v.indices("cross_attention_layers")
    if any(i >= n for i in cross):
        raise BadInputError(f"{v.name}: cross_attention_layers={list(cross)} names layers past num_hidden_layers={n}")
    specs: dict[str, Group] = {"full": base, "cross": replace(base, attn_type="cross")}
    names = ["cross" if i in cross else "full" for i in range(n)]
    return collect((i, name, specs[name]) for i, name in enumerate(names))
