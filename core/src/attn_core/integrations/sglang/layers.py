"""What SGLang's attention layers say, held against the decision. A layer that asks for other attention is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime import BoundGroup
from attn_core.spec import AttentionSpec

ABSENT: Mapping[str, object] = {
    "is_cross_attention": False,
    "pos_encoding_mode": "NONE",
    "logit_capping_method": "tanh",
    "xai_temperature_len": -1,
}
"""Attributes of a layer that would change attention in ways no group here describes -> the value that does not."""


def window(size: int | None) -> int | None:
    """SGLang counts the keys before a token, -1 for no window; attn-core counts the token too: 15 is 16."""
    return None if size is None or size < 0 else size + 1


def softcap(cap: float) -> float | None:
    """SGLang's 0.0 is no cap."""
    return cap or None


STATED: Mapping[str, tuple[Callable[[Any], Any], Callable[[AttentionSpec], Any]]] = {
    "heads": (lambda layer: layer.tp_q_head_num, lambda s: s.num_heads),
    "kv heads": (lambda layer: layer.tp_k_head_num, lambda s: s.facts("absorbed")["num_kv_heads"]),
    "head_dim": (lambda layer: layer.qk_head_dim, lambda s: s.facts("absorbed")["head_dim"]),
    "v_head_dim": (lambda layer: layer.v_head_dim, lambda s: s.facts("absorbed")["v_head_dim"]),
    "scale": (lambda layer: layer.scaling, lambda s: s.softmax_scale),
    "sliding_window": (lambda layer: window(layer.sliding_window_size), lambda s: s.sliding_window),
    "logit_softcap": (lambda layer: softcap(layer.logit_cap), lambda s: s.logit_softcap),
    "attn_type": (lambda layer: layer.attn_type.value, lambda s: s.attn_type),
}
"""What a layer and its group both state, in attn-core's words: (of a layer, of a group); of MLA as its cache is."""


def check_layer(layer: Any, group: BoundGroup) -> None:
    """Raise unless ``group`` was decided for the very attention that a ``RadixAttention`` layer asks for.

    :class:`BadInputError` names every value that differs, :class:`AttnCoreError` what no group describes.
    """
    where = f"layer {layer.layer_id} of SGLang's model, group {group.name!r}"
    for name, plain in ABSENT.items():
        if getattr(layer, name) != plain:
            raise AttnCoreError(f"{where}: {name}={getattr(layer, name)!r} is not supported by the SGLang integration")
    differ = []
    for name, (of_layer, of_group) in STATED.items():
        asked, decided = of_layer(layer), of_group(group.spec)
        if not same(asked, decided):
            differ.append(f"{name}={asked} (decided for {decided})")
    if differ:
        raise BadInputError(f"{where} asks for other attention than was decided: {', '.join(differ)}")


def same(a: Any, b: Any) -> bool:
    """Equal, floats up to rounding: engines compute scales in their own order."""
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6))
