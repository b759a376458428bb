"""What a call from a transformers layer may say. Nothing is ignored that could change the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime import BoundGroup

LATER = "not supported by the transformers integration yet; use 'sdpa' or 'eager' for this model"

_FREE = frozenset(
    {"position_ids", "use_cache", "output_hidden_states", "output_router_logits", "return_dict",
     "encoder_hidden_states"}
)  # fmt: skip
"""Keywords that reach every layer and change nothing in attention: rotary embeddings are applied before it, and k and v
of cross attention were made from the encoder's states."""

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

_TENSORS = ("s_aux", "position_bias", "indices")
"""Keywords that a kernel takes, under names of its own."""


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
    spec = group.spec
    if dropout:
        raise AttnCoreError(f"{_where(group, module)}: dropout={dropout} is not supported; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not math.isclose(scale, group.scale, rel_tol=1e-6):
        raise BadInputError(
            f"{_where(group, module)}: the model scales by {scale}, the decision was made for {group.scale}"
        )
    found = ((query.shape[1], query.shape[3]), (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
    kv_heads = spec.num_kv_heads
    asked = ((spec.num_heads, spec.head_dim), (kv_heads, spec.head_dim), (kv_heads, spec.v_head_dim))
    if found != asked:
        raise BadInputError(
            f"{_where(group, module)}: q, k, v have (heads, width) {found}, the decision was made for {asked}"
        )
    if not query.dtype == key.dtype == value.dtype:
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise BadInputError(f"{_where(group, module)}: q, k, v are {dtypes}; the decision was made for one dtype")
    for name, got in kwargs.items():
        if name in _FREE or name in _TENSORS or (got is None and name not in _NONE_SAYS):
            continue
        if name not in _STATED:
            raise BadInputError(
                f"{_where(group, module)}: keyword {name!r} may change the result, and nobody here knows what it "
                f"means; {LATER}"
            )
        want = _STATED[name](group)
        if not (_same(got, want) or (name in _FALSE_IS_FREE and not got)):
            raise BadInputError(
                f"{_where(group, module)}: the model asks for {name}={got!r}, the decision was made for {want!r}"
            )


def tensors(group: BoundGroup, module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's sinks, bias and indices under the names of :class:`Runner`, the sinks prepared for the kernels.

    Raises :class:`BadInputError` for one that the decision was made without, or that it needs and the call lacks.
    """
    spec = group.spec
    sinks, bias, indices = (kwargs.get(name) for name in _TENSORS)
    if bias is not None and not spec.bias and _is_zero(bias):
        bias = None
    claims = ((sinks, spec.sinks), (bias, spec.bias), (indices, spec.sparse != "none"))
    for name, (got, claimed) in zip(_TENSORS, claims):
        if (got is not None) is not claimed:
            said, made = ("gives", "without") if got is not None else ("gives no", "with")
            raise BadInputError(f"{_where(group, module)}: the model {said} {name!r}, the decision was made {made} it")
    # Prepared per call, which costs a few microseconds, because weights may be changed in place.
    prepared = None if sinks is None else group.prepare_sinks(sinks)
    return {"sinks": prepared, "bias": bias, "indices": indices}


_known_zero: Any = WeakTensorKeyDictionary()
"""Biases that were looked at: T5's cross attention hands all its layers the same zeros."""


def _is_zero(bias: Tensor) -> bool:
    if bias not in _known_zero:
        _known_zero[bias] = not bool(bias.any())
    return bool(_known_zero[bias])


def _where(group: BoundGroup, module: nn.Module) -> str:
    return f"{type(module).__name__} in group {group.name!r}"


def _same(a: Any, b: Any) -> bool:
    return a is b or a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6))
