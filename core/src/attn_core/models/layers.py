"""Which layer does what: layer types and window patterns as kinds, and equal layers merged into named groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models.view import View
from attn_core.spec.check import nearest
from attn_core.spec.model import Group

KINDS: dict[str, tuple[str, ...]] = {
    "full_attention": ("full",),
    "attention": ("full",),
    "indexed_attention": ("indexed",),
    "deepseek_sparse_attention": ("indexed",),
    "sliding_attention": ("sliding",),
    "chunked_attention": ("chunked",),
    "linear_attention": ("linear",),
    "mamba": ("linear",),
    "conv": (),
    "mlp": (),
    "moe": (),
}
"""Hugging Face ``layer_types`` -> what the layer holds: attention of one kind, or none."""

Kinds = tuple[tuple[str, ...], ...]


def window(v: View) -> int | None:
    """Tokens of the sliding window, the token itself included; None where the config turns it off."""
    use, size = v.flag("use_sliding_window", True), v.get("sliding_window")
    return v.size("sliding_window") if use and size is not None else None


def kinds(v: View) -> Kinds:
    """What each decoder layer holds, by the first rule the config states.

    ``layer_types``; a window pattern (an integer n: every n-th layer is full; letters L and G repeated, the last
    layer full: Exaone 4; kinds repeated: class defaults); ``max_window_layers`` (Qwen: the first ones are full); all
    windowed (Mistral); all chunked.
    """
    n = v.layers
    types, pattern, first = v.get("layer_types"), v.get("sliding_window_pattern"), v.get("max_window_layers")
    size, chunk = window(v), v.get("attention_chunk_size")
    if types is not None:
        return _of_types(v, types, n)
    if size is None:
        return (("full",) if chunk is None else ("chunked",),) * n
    for other in ("attention_chunk_size", "no_rope_layers"):
        if v.get(other):
            raise _conflict(v, f"sliding_window and {other}, but no layer_types to tell which layer has which")
    if pattern is not None:
        return _of_pattern(v, pattern, n)
    if first is not None:
        start = v.count("max_window_layers")
        return tuple(("sliding",) if i >= start else ("full",) for i in range(n))
    return (("sliding",),) * n


def names(v: View, *allowed: str) -> list[str]:
    """:func:`kinds` for a model whose layers are each of one of the ``allowed`` kinds."""
    found = kinds(v)
    odd = [i for i, kind in enumerate(found) if len(kind) != 1 or kind[0] not in allowed]
    if odd:
        raise _conflict(v, f"a layer {odd[0]} that is neither {' nor '.join(allowed)}")
    return [kind[0] for kind in found]


def _of_types(v: View, types: Any, n: int) -> Kinds:
    if not isinstance(types, Sequence) or isinstance(types, str) or len(types) != n:
        count = len(types) if isinstance(types, Sequence) and not isinstance(types, str) else repr(types)
        raise _conflict(v, f"layer_types for {count} layers, but num_hidden_layers={n}")
    unknown = [t for t in types if not isinstance(t, str) or t not in KINDS]
    if unknown:
        hint = nearest(unknown[0], KINDS)
        raise _conflict(v, f"layer type {unknown[0]!r}, which is none of {', '.join(KINDS)}{hint}")
    v.get("full_attention_interval")  # what layer_types was made from
    found = tuple(KINDS[t] for t in types)
    if window(v) is None and any("sliding" in kind for kind in found):
        if v.flag("use_sliding_window", True):
            raise _conflict(v, "layers of type sliding_attention, but no sliding_window")
        found = tuple(("full",) if kind == ("sliding",) else kind for kind in found)
    if v.get("attention_chunk_size") is None and any("chunked" in kind for kind in found):
        raise _conflict(v, "layers of type chunked_attention, but no attention_chunk_size")
    return found


def _of_pattern(v: View, pattern: Any, n: int) -> Kinds:
    if isinstance(pattern, tuple) and pattern:
        return tuple((pattern[i % len(pattern)],) for i in range(n))
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return tuple(("full",) if (i + 1) % pattern == 0 else ("sliding",) for i in range(n))
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        letters = [pattern[i % len(pattern)] for i in range(n)]
        letters[-1] = "G"
        return tuple(("sliding",) if c == "L" else ("full",) for c in letters)
    raise _conflict(v, f"sliding_window_pattern={pattern!r}, which is neither a period nor letters L and G")


def _conflict(v: View, what: str) -> BadInputError:
    return BadInputError(f"{v.name}: the config has {what}")


def collect(entries: Iterable[tuple[int, str, Group]]) -> dict[str, Group]:
    """Merge (layer, group name, spec of one layer) into groups in order of first appearance.

    Layers with the same name and spec share a group; a second spec under a taken name becomes ``name_2``.
    """
    merged: dict[tuple[str, Group], list[int]] = {}
    for layer, name, spec in entries:
        merged.setdefault((name, spec), []).append(layer)
    groups: dict[str, Group] = {}
    for (name, spec), layers in merged.items():
        unique, count = name, 1
        while unique in groups:
            count += 1
            unique = f"{name}_{count}"
        groups[unique] = replace(spec, layers=tuple(layers))
    return groups
