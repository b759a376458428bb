"""What a call from a transformers layer may say. Nothing is ignored that could change the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime import BoundGroup

LATER = "not supported by the transformers integration yet; use 'sdpa' or 'eager' for this model"

_FREE = frozenset({"position_ids", "use_cache", "output_hidden_states", "output_router_logits", "return_dict"})
"""Keywords that reach every layer and change nothing in attention: rotary embeddings are applied before it."""

_STATED: Mapping[str, Callable[[BoundGroup], Any]] = {
    "sliding_window": lambda g: g.spec.sliding_window,
    "softcap": lambda g: g.spec.logit_softcap,
    "is_causal": lambda g: g.spec.causal,
    "output_attentions": lambda g: False,
    "deterministic": lambda g: g.options.deterministic,
}
"""Keywords that repeat what the decision was made for: their value must be this one."""

_NONE_SAYS = frozenset({"sliding_window", "softcap"})
"""Of these, None is a statement (no window, no cap); of all others it means that nothing was said."""

_FALSE_IS_FREE = frozenset({"deterministic"})
"""Of these, False asks for nothing."""


def check_call(
    group: BoundGroup,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise unless the call is the very attention that ``group`` was decided for.

    :class:`BadInputError` names a value that contradicts the decision, or a keyword that nobody here knows;
    :class:`AttnCoreError` says what the integration cannot do.
    """
    spec, where = group.spec, f"{type(module).__name__} in group {group.name!r}"
    if dropout:
        raise AttnCoreError(f"{where}: dropout={dropout} is not supported; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not math.isclose(scale, group.scale, rel_tol=1e-6):
        raise BadInputError(f"{where}: the model scales by {scale}, the decision was made for {group.scale}")
    found = ((query.shape[1], query.shape[3]), (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
    kv_heads = spec.num_kv_heads
    asked = ((spec.num_heads, spec.head_dim), (kv_heads, spec.head_dim), (kv_heads, spec.v_head_dim))
    if found != asked:
        raise BadInputError(f"{where}: q, k, v have (heads, width) {found}, the decision was made for {asked}")
    if kwargs.get("is_causal") is None and getattr(module, "is_causal", True) != spec.causal:
        causal = "bidirectional" if spec.causal else "causal"
        raise BadInputError(f"{where}: the layer is {causal}, the decision was made for {spec.attn_type}")
    for name, got in kwargs.items():
        if name in _FREE or (got is None and name not in _NONE_SAYS):
            continue
        if name not in _STATED:
            raise BadInputError(
                f"{where}: keyword {name!r} may change the result, and nobody here knows what it means; {LATER}"
            )
        want = _STATED[name](group)
        if not (_same(got, want) or (name in _FALSE_IS_FREE and not got)):
            raise BadInputError(f"{where}: the model asks for {name}={got!r}, the decision was made for {want!r}")


def _same(a: Any, b: Any) -> bool:
    return a is b or a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6))
