"""From a question to kernels in the process that runs the layers, and from a layer to its group, checked."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from attn_core.errors import BindError, NoBackendError
from attn_core.integrations.devices import platform_of
from attn_core.integrations.vllm.caches import ORDERS, layouts_for
from attn_core.integrations.vllm.question import Question, keywords
from attn_core.runtime import AttentionBackend, BoundGroup
from attn_core.spec import AttentionSpec, Decision

_log = logging.getLogger("vllm.attn_core")
"""A child of vLLM's logger, so that a decision shows where vLLM's own choices do."""


@cache
def bound(question: Question, device: int, rank: int) -> AttentionBackend:
    """Kernels for ``question``: bound once per process, said in one line."""
    platform = platform_of(question.device_type)
    attn = platform.attention_backend(question.model, device=device, rank=rank, **keywords(question.options))
    chosen = ", ".join(f"{name}: {'/'.join(_attending(attn.decision, name))}" for name in attn.groups)
    _log.info("attn-core decided %s for %s on %s: %s", attn.decision.digest, question.model.architecture,
              attn.decision.device, chosen)  # fmt: skip
    return attn


def _attending(decision: Decision, group: str) -> tuple[str, ...]:
    roles = [role for role in decision.groups[group].choices if role != "kv_write"]
    return tuple(dict.fromkeys(decision.backend(role, group) for role in roles))


@cache
def layouts(question: Question) -> tuple[str, ...]:
    """vLLM's cache layouts that the question has an answer for, the decided ones first."""
    first = _layouts(question.decision)
    more: list[str] = []
    for view in dict.fromkeys(ORDERS.values()):
        try:
            more += _layouts(question.with_options(kv_layout=view).decision)
        except NoBackendError:
            continue
    return tuple(dict.fromkeys((*first, *more)))


def in_layout(question: Question, layout: str | None) -> Question:
    """The question whose answer lives in the layout that vLLM settled for all of the model's backends."""
    if layout is None or layout in _layouts(question.decision):
        return question
    return question.with_options(kv_layout=ORDERS[layout])


def _layouts(decision: Decision) -> tuple[str, ...]:
    return layouts_for([g.values["kv_layout"] for g in decision.groups.values() if "kv_layout" in g.values])


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What vLLM's model code says of a layer when it makes it, in our words."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    logit_softcap: float | None
    alibi_slopes: tuple[float, ...] | None
    attn_type: str
    sinks: bool
    shares_kv: bool
    latent: tuple[int, ...] | None = None
    """MLA: widths of latent, rope, nope and v."""


def check_layer(name: str, facts: LayerFacts, group: BoundGroup) -> None:
    """Raise :class:`BindError` unless the layer is what its group was decided for.

    The group was read from the model's config, the layer comes from vLLM's code for the model: where they differ, one
    of them is wrong, and so would the tokens be. A window no shorter than ``max_model_len`` is none.
    """
    spec, limit = group.spec, group.options.max_model_len
    binding = next(iter(group.bindings.values()))
    decided = LayerFacts(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=group.scale,
        sliding_window=_reach(spec.sliding_window, limit),
        logit_softcap=spec.logit_softcap,
        alibi_slopes=binding.alibi_slopes,
        attn_type=spec.attn_type,
        sinks=spec.sinks,
        shares_kv=spec.kv_from is not None,
        latent=_latent(spec),
    )
    for field, want in vars(decided).items():
        got = getattr(facts, field)
        got = _reach(got, limit) if field == "sliding_window" else got
        if not _equal(got, want):
            raise BindError(
                f"layer {name} has {field}={got!r}, but its group {group.name!r} was decided for {want!r}, as the "
                "model's config says; attn-core reads this model otherwise than vLLM does"
            )


def _latent(spec: AttentionSpec) -> tuple[int, ...] | None:
    return (spec.latent_dim or 0, spec.rope_dim or 0, spec.nope_dim or 0, spec.v_head_dim) if spec.latent_dim else None


def _reach(window: int | None, limit: int | None) -> int | None:
    return None if window is None or (limit is not None and window >= limit) else window


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    return bool(a == b)


def prepared_sinks(group: BoundGroup, sinks: Tensor | None) -> Any:
    """A layer's sinks as its group's kernels want them."""
    return None if sinks is None else group.prepare_sinks(sinks.detach())
