"""Models that mix softmax and linear attention: which layer is which, as each model's config says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models import dense
from attn_core.models.layers import collect
from attn_core.models.linear import linear
from attn_core.models.view import View
from attn_core.spec.model import Group

PATTERN = {"*": "full", "M": "linear", "-": None, "E": None}
"""Letters of Nemotron-H's ``hybrid_override_pattern``: attention, Mamba-2, MLP, experts."""


def read_interval(v: View) -> dict[str, Group]:
    """Qwen3-Next, Qwen3.5: ``layer_types``, else every ``full_attention_interval``-th layer has softmax attention."""
    if v.get("layer_types") is not None:
        return dense.read(v)
    every = v.size("full_attention_interval", 4)
    return _assemble(v, ["full" if (i + 1) % every == 0 else "linear" for i in range(v.layers)])


def read_kimi(v: View) -> dict[str, Group]:
    """Kimi-Linear: the checkpoint lists layers from 1. Its full layers are MLA without rotation (``mla_use_nope``),
    but keep the rope columns, so the widths are those of any MLA. Source: ``KimiLinearConfig.__post_init__``.
    """
    v.get("mla_use_nope")
    nested: Mapping[str, Any] = v.sub("linear_attn_config") or {}
    if "full_attn_layers" not in nested or "kda_layers" not in nested:
        v.need("layer_types")
        return dense.read(v)
    own = View(nested, parent=v)
    full, kda = own.indices("full_attn_layers"), own.indices("kda_layers")
    if sorted((*full, *kda)) != list(range(1, v.layers + 1)):
        raise BadInputError(
            f"{v.name}: full_attn_layers and kda_layers must name each of the layers 1..{v.layers} exactly once"
        )
    return _assemble(v, ["full" if i + 1 in full else "linear" for i in range(v.layers)])


def read_nemotron(v: View) -> dict[str, Group]:
    """Nemotron-H: one letter or block type per layer; MLP and expert layers hold no attention.

    The block list counts, ``num_hidden_layers`` is derived from it. Source: ``NemotronHConfig``.
    """
    pattern = v.get("hybrid_override_pattern")
    if pattern is None:
        (types,) = v.need("layer_types")
        return dense.read(v.but(num_hidden_layers=len(types) if isinstance(types, list | tuple) else None))
    unknown = sorted(set(pattern) - set(PATTERN)) if isinstance(pattern, str) else [repr(pattern)]
    if unknown:
        raise BadInputError(f"{v.name}: hybrid_override_pattern has {unknown[0]}, known are {' '.join(PATTERN)}")
    return _assemble(v.but(num_hidden_layers=len(pattern)), [PATTERN[letter] for letter in pattern])


def read_mamba(v: View) -> dict[str, Group]:
    """Bamba, Granite 4 hybrid and Falcon-H1: Mamba-2 layers, attention layers by list or type, or both in one layer.

    ``mamba_d_head`` may be "auto": the inner width (``mamba_d_ssm``, else ``mamba_expand * hidden_size``) over heads.
    """
    n = v.layers
    if v.get("mamba_head_dim") in (None, "auto"):
        inner = v.size("mamba_d_ssm", v.size("mamba_expand", 2) * v.size("hidden_size"))
        v = v.but(mamba_d_head=inner // v.size("mamba_num_heads"))
    if v.kind == "falcon_h1":
        specs: dict[str, Group] = {"full": dense.attention(v), "linear": linear(v)}
        return collect((i, name, specs[name]) for i in range(n) for name in specs)
    if v.get("layer_types") is not None:
        return dense.read(v)
    softmax = v.indices("attn_layer_indices") if v.get("attn_layer_indices") is not None else ()
    return _assemble(v, ["full" if i in softmax else "linear" for i in range(n)])


def _assemble(v: View, names: list[str | None]) -> dict[str, Group]:
    specs: dict[str, Group] = {}
    if "full" in names:
        specs["full"] = dense.attention(v)
    if "linear" in names:
        specs["linear"] = linear(v)
    return collect((i, name, specs[name]) for i, name in enumerate(names) if name is not None)
