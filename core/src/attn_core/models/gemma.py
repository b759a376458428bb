"""Gemma 1 to 4 and PaliGemma: soft caps, fixed scales, alternating windows, two-sided images, shared KV layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models import dense
from attn_core.models.layers import collect, names, window
from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec, Group


def read(v: View) -> dict[str, Group]:
    """Gemma 1 and 2: the general reader; cap, scale and windows are fields."""
    return dense.read(v)


def read_prefix(v: View) -> dict[str, Group]:
    """PaliGemma: image and prompt tokens see each other in both directions, the answer is causal.

    ``use_bidirectional_attention`` in its text config means just that prefix, not an encoder.
    """
    return dense.read(v, attn_type="decoder", bidirectional_prefix=True)


def read_gemma3(v: View) -> dict[str, Group]:
    """Gemma 3: image tokens of the multimodal model attend in both directions in every layer (inside the window in
    sliding ones). Source: ``create_masks_for_vision_model`` in ``modeling_gemma3.py``.
    """
    return dense.read(_two_sided_window(v), bidirectional_prefix=v.parent is not None)


def read_gemma3n(v: View) -> dict[str, Group]:
    """Gemma 3n: q and k are normalised and the scale is 1; the last layers read an earlier layer's cache."""
    return collect(_share_kv(v, dense.read(v, scale=1.0)))


def read_gemma4(v: View) -> dict[str, Group]:
    """Gemma 4: as 3n, and full layers have their own head width and kv heads.

    Images are two-sided only in sliding layers and only where ``use_bidirectional_attention`` says ``vision``.
    Source: ``Gemma4TextConfig`` and ``create_masks_for_vision_model`` in ``modeling_gemma4.py``.
    """
    v = _two_sided_window(v)
    has = names(v, "full", "sliding")
    if v.get("layer_types") is None:
        has[-1] = "full"
    base = dense.attention(v, scale=1.0, bidirectional_prefix=False)
    images = dense.two_sided(v) == "vision" and v.parent is not None
    sliding = replace(base, sliding_window=window(v), bidirectional_prefix=images)
    entries: list[tuple[int, str, Group]] = []
    for i, name in enumerate(has):
        changes = _full_layer(v, i) if name == "full" else _overrides(v, i)
        entries.append((i, name, replace(base if name == "full" else sliding, **changes)))
    return collect(_share_kv(v, collect(entries)))


def _overrides(v: View, layer: int) -> dict[str, Any]:
    """What ``per_layer_config`` (transformers' own form) changes for one layer; keys may be zero-padded strings."""
    table = v.sub("per_layer_config") or {}
    found: Any = next((table[key] for key in table if str(key).isdecimal() and int(key) == layer), {})
    if not isinstance(found, Mapping):
        raise BadInputError(f"{v.name}: per_layer_config[{layer}]={found!r} must be an object of fields")
    ours = {"head_dim": "head_dim", "num_key_value_heads": "num_kv_heads", "num_attention_heads": "num_heads"}
    changes = {ours[key]: value for key, value in found.items() if key in ours}
    if "head_dim" in changes:
        changes["v_head_dim"] = changes["head_dim"]
    return changes


def _full_layer(v: View, layer: int) -> dict[str, Any]:
    if v.sub("per_layer_config") is not None:
        return _overrides(v, layer)
    width = v.size("global_head_dim", 512)
    changes: dict[str, Any] = {"head_dim": width, "v_head_dim": width}
    if v.flag("attention_k_eq_v") and v.get("num_global_key_value_heads") is not None:
        changes["num_kv_heads"] = v.size("num_global_key_value_heads")
    return changes


def _two_sided_window(v: View) -> View:
    """Embedding models: the stated window is the total width, so |i-j| < W // 2 + 1.

    Source: ``__post_init__`` of Gemma3TextConfig and Gemma4TextConfig.
    """
    if dense.two_sided(v) != "all" or v.get("sliding_window") is None:
        return v
    return v.but(sliding_window=v.size("sliding_window") // 2 + 1)


def _share_kv(v: View, groups: Mapping[str, Group]) -> Iterator[tuple[int, str, Group]]:
    """Layers from ``num_hidden_layers - num_kv_shared_layers`` on read the cache of the group they would belong to."""
    shared = v.count("num_kv_shared_layers", 0)
    first = v.layers - shared
    for name, group in groups.items():
        if shared and group.layers[0] >= first:
            raise BadInputError(f"{v.name}: num_kv_shared_layers={shared} leaves no {name} layer that writes a cache")
    of = {i: (name, replace(group, layers=())) for name, group in groups.items() for i in group.layers}
    for i in sorted(of):
        name, spec = of[i]
        if i >= first and isinstance(spec, AttentionSpec):
            yield i, f"{name}_shared", replace(spec, kv_from=name)
        else:
            yield i, name, spec
