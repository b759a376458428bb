"""Image towers of multimodal models: bidirectional attention with layer indices of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec, Group

TOWERS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "siglip_vision_model": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "siglip2_vision_model": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "pixtral": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
    "internvl_vision": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
    "intern_vit_6b": {},
    "llama4_vision_model": {"hidden_size": 768, "num_attention_heads": 16, "num_hidden_layers": 34},
    "mllama_vision_model": {
        "hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 32, "num_global_layers": 8,
    },
    "idefics3_vision": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 12},
    "smolvlm_vision": {"hidden_size": 1152, "num_attention_heads": 12, "num_hidden_layers": 12},
    "qwen2_vl": {"embed_dim": 1280, "num_attention_heads": 16, "num_hidden_layers": 32},
    "qwen2_5_vl": {
        "hidden_size": 3584, "num_attention_heads": 16, "num_hidden_layers": 32,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
    "qwen3_vl": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
    "qwen3_vl_moe": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
    "qwen3_5": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
    "qwen3_5_moe": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
    "gemma4_vision": {
        "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 16, "num_key_value_heads": 12,
        "head_dim": 64, "scale": 1.0,
    },
}  # fmt: skip
"""Towers whose code we have read -> class defaults of transformers, and a scale where it is not 1/sqrt(head_dim)."""

_UNREADABLE = re.compile(r"window|global_attn|softcap|logit_cap|relative|sink|stages|depths|chunk")
"""Fields of an unknown tower that say it is no plain bidirectional attention."""


def read(v: View) -> dict[str, Group]:
    """Groups ``vision`` and, for Qwen2.5-VL, ``vision_window``; a tower that cannot be read is noted, not guessed."""
    text, data = v, None
    parent: View | None = v
    while parent is not None and data is None:
        data = parent.sub("vision_config")
        v, parent = parent, parent.parent
    if data is None:
        return {}
    kind = str(data.get("model_type", ""))
    kind = kind if kind in TOWERS else kind.removesuffix("_vision")
    tower = View(data, kind=kind, defaults=TOWERS.get(kind, {}), parent=v)
    if tower.inherited("dtype") is None:
        tower = tower.but(dtype=text.dtype)
    smells = sorted(str(key) for key, value in data.items() if _UNREADABLE.search(str(key)) and value)
    if kind not in TOWERS and smells:
        v.note(f"the vision tower {kind or 'without a model_type'} is not known and not read: {smells[0]}")
        return {}
    try:
        groups = _groups(tower)
    except BadInputError as e:
        v.note(f"the vision tower is not read: {e}")
        return {}
    if kind not in TOWERS:
        v.note(f"the vision tower {kind or 'without a model_type'} is not known; read as plain bidirectional attention")
    return groups


def _groups(v: View) -> dict[str, Group]:
    heads, layers = v.size("num_attention_heads"), v.layers + v.count("num_global_layers", 0)
    # Qwen2-VL states the tower's width as embed_dim; its hidden_size is the width of the language model.
    width = v.but(hidden_size=v.get("embed_dim")) if v.get("embed_dim") is not None else v
    spec = AttentionSpec(
        attn_type="encoder_only",
        num_heads=heads,
        num_kv_heads=v.size("num_key_value_heads", heads),
        head_dim=width.head_dim,
        dtype=v.dtype,
        scale=v.defaults.get("scale"),
        layers=tuple(range(layers)),
    )
    if v.get("fullatt_block_indexes") is None:
        return {"vision": spec}
    full = v.indices("fullatt_block_indexes")
    v.note(
        "vision_window blocks attend inside image windows that the engine packs as sequences (cu_seqlens); "
        "the kernel sees plain bidirectional attention"
    )
    both = {"vision": full, "vision_window": tuple(i for i in range(layers) if i not in full)}
    return {name: replace(spec, layers=indices) for name, indices in both.items() if indices}
