"""``torch.ops.attn_core.*``: a group's kernels as operators, for models under ``torch.compile``.

    from attn_core.integrations import torch_ops

    slot = torch_ops.Slot(group)                     # one per group and batch in flight, kept by the engine
    ...
    out = torch.ops.attn_core.forward(q, k, v, list(cache.data), slot.handle)      # in the model; fullgraph=True
    ...
    slot.set(group.plan(batch, out=slot.plan))       # every step, outside of compiled code

Graphs hold the handle, never the plan: a new step recompiles nothing. Operators declare what they mutate, have fake
implementations that need no plan, and run on any device torch knows. They are forward only. ``merge_state`` needs no
operator: it is plain torch, and compiles as it is.

Arguments that several operators share:

``kv_cache``
    The tensors of one layer's cache (``list(cache.data)``) or the engine's own, shaped as the group's layout says.
``q_rope``
    The second half of q where the group settled ``mla_query="split"``.
``sinks``, ``decode_sinks``
    The layer's prepared sinks. Where ``prepare_sinks`` returns a mapping by role, ``decode_sinks`` is that of decode
    and ``sinks`` that of prefill.
``k_scale``, ``v_scale``
    A quantised cache's scales, float32 ``()`` or ``(num_kv_heads,)``; tensors, so that all layers share one graph.

``q`` may have more rows than the step has tokens (shapes padded for compilation): their results are zeros, lse -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.integrations.torch_slots import Held, Slot, held

__all__ = ["NAMESPACE", "Slot"]

NAMESPACE = "attn_core"

_ATTEND = "Tensor q, Tensor? k, Tensor? v, Tensor(a!)[] kv_cache, str slot, *, "
_EXTRAS = (
    "Tensor? q_rope=None, Tensor? sinks=None, Tensor? decode_sinks=None, Tensor? indices=None, Tensor? bias=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None"
)

# what attends


def forward(q: Tensor, k: Tensor | None, v: Tensor | None, kv_cache: list[Tensor], slot: str, **extras: Any) -> Tensor:
    """Write k and v where the plan says, then attend: ``(tokens, heads, width)``, contiguous."""
    here = held(slot)
    out = _new_out(here, q)
    _attend(here, q, k, v, kv_cache, slot, out, False, **extras)
    return out


def forward_out(
    q: Tensor, k: Tensor | None, v: Tensor | None, kv_cache: list[Tensor], slot: str, *, out: Tensor, **extras: Any
) -> None:
    """As ``forward``, into the engine's own ``out``."""
    _attend(held(slot), q, k, v, kv_cache, slot, out, False, **extras)


def forward_lse(
    q: Tensor, k: Tensor | None, v: Tensor | None, kv_cache: list[Tensor], slot: str, **extras: Any
) -> tuple[Tensor, Tensor]:
    """As ``forward``, with the log-sum-exp, float32 ``(tokens, heads)``; resolve with ``lse=True``."""
    here = held(slot)
    out = _new_out(here, q)
    lse = _attend(here, q, k, v, kv_cache, slot, out, True, **extras)
    return out, lse.contiguous()


def encode(q: Tensor, k: Tensor, v: Tensor, slot: str, *, bias: Tensor | None = None) -> Tensor:
    """Attention of a group without a cache: ``(tokens, heads, width)``, contiguous."""
    if torch.is_grad_enabled():
        _no_backward(q, k, v, bias)
    here = _uncached(slot)
    out = _new_out(here, q)
    _run(here, q, k, v, None, slot, out, False, bias=bias)
    return out


def _attend(
    here: Held,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kv_cache: list[Tensor],
    slot: str,
    out: Tensor,
    return_lse: bool,
    *,
    q_rope: Tensor | None = None,
    sinks: Tensor | None = None,
    decode_sinks: Tensor | None = None,
    indices: Tensor | None = None,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Any:
    if torch.is_grad_enabled():
        _no_backward(q, k, v, q_rope, sinks, decode_sinks, bias)
    cache = here.cache(slot, kv_cache, k_scale, v_scale)
    both = q if q_rope is None else (q, q_rope)
    own = sinks if decode_sinks is None else {"prefill": sinks, "decode": decode_sinks}
    return _run(here, both, k, v, cache, slot, out, return_lse, sinks=own, indices=indices, bias=bias)


def _run(
    here: Held, q: Any, k: Any, v: Any, cache: Any, slot: str, out: Tensor, return_lse: bool,
    sinks: Any = None, indices: Any = None, bias: Any = None,
) -> Any:  # fmt: skip
    """The bound ``forward``, on the rows that the step has. Returns the lse where asked for."""
    group, plan = here.group, here.current(slot)
    rows = len(out) if plan.batch is None else plan.batch.num_tokens
    if rows == len(out):
        got = group.forward(
            q, k, v, cache, plan, sinks=sinks, indices=indices, bias=bias, out=out, return_lse=return_lse
        )
        return got[1] if return_lse else None
    if rows > len(out):
        raise BadInputError(f"slot {slot!r}: its plan is for {rows} tokens, q has {len(out)}; set this step's plan")
    together = group.spec.attn_type != "cross"  # k and v line up with q
    got = group.forward(
        tuple(x[:rows] for x in q) if isinstance(q, tuple) else q[:rows],
        k[:rows] if together and k is not None else k, v[:rows] if together and v is not None else v, cache, plan,
        sinks=sinks, indices=None if indices is None else indices[:rows], bias=bias, out=out[:rows],
        return_lse=return_lse,
    )  # fmt: skip
    out[rows:].zero_()
    return torch.cat((got[1], got[1].new_full((len(out) - rows, here.heads), -torch.inf))) if return_lse else None


def _new_out(here: Held, q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], here.heads, here.width), dtype=here.dtype)


# what writes


def write_kv(
    k: Tensor,
    v: Tensor,
    kv_cache: list[Tensor],
    slot: str,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Only write k and v where the plan says."""
    here = held(slot)
    if torch.is_grad_enabled():
        _no_backward(k, v)
    plan = here.current(slot)
    if plan.write is None and here.group.spec.kv_from is None:
        raise BadInputError(f"slot {slot!r}: its plan writes nothing; give Batch(slot_mapping=...)")
    slots = None if plan.batch is None else plan.batch.slot_mapping
    if slots is not None and len(slots) < len(k):
        k, v = k[: len(slots)], v[: len(slots)]
    here.group.write_kv(k, v, here.cache(slot, kv_cache, k_scale, v_scale), plan)


def _no_backward(*inputs: Tensor | None) -> None:
    """The kernels have no backward. Without this, gradients would silently miss the attention."""
    if any(x is not None and x.requires_grad for x in inputs):
        raise AttnCoreError(
            "torch.ops.attn_core is for inference: its kernels have no backward; run under torch.inference_mode() or "
            "torch.no_grad()"
        )


# the same without data: shapes, and what can be refused while tracing


def _fake_attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, kv_cache: Sequence[Tensor], slot: str, **extras: Any
) -> Tensor:
    here = held(slot)
    if torch.is_grad_enabled():
        _no_backward(q, k, v, *extras.values())
    here.check_cache(slot, kv_cache)
    return _new_out(here, q)


def _fake_out(
    q: Tensor, k: Tensor | None, v: Tensor | None, kv_cache: Sequence[Tensor], slot: str, **extras: Any
) -> None:
    _fake_attend(q, k, v, kv_cache, slot, **extras)


def _fake_lse(
    q: Tensor, k: Tensor | None, v: Tensor | None, kv_cache: Sequence[Tensor], slot: str, **extras: Any
) -> tuple[Tensor, Tensor]:
    out = _fake_attend(q, k, v, kv_cache, slot, **extras)
    return out, out.new_empty(out.shape[:2], dtype=torch.float32)


def _fake_encode(q: Tensor, k: Tensor, v: Tensor, slot: str, *, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled():
        _no_backward(q, k, v, bias)
    return _new_out(_uncached(slot), q)


def _fake_write(k: Tensor, v: Tensor, kv_cache: Sequence[Tensor], slot: str, **scales: Tensor | None) -> None:
    here = held(slot)
    if torch.is_grad_enabled():
        _no_backward(k, v)
    here.check_cache(slot, kv_cache)


def _uncached(slot: str) -> Held:
    here = held(slot)
    if here.page_size:
        kind = f"group {here.group.name!r} ({here.group.spec.attn_type})"
        raise BadInputError(f"slot {slot!r}: {kind} keeps a cache; call attn_core::forward, not encode")
    return here


_OPERATORS = (
    ("forward", f"({_ATTEND}{_EXTRAS}) -> Tensor", forward, _fake_attend),
    ("forward_out", f"({_ATTEND}Tensor(b!) out, {_EXTRAS}) -> ()", forward_out, _fake_out),
    ("forward_lse", f"({_ATTEND}{_EXTRAS}) -> (Tensor, Tensor)", forward_lse, _fake_lse),
    ("encode", "(Tensor q, Tensor k, Tensor v, str slot, *, Tensor? bias=None) -> Tensor", encode, _fake_encode),
    (
        "write_kv",
        "(Tensor k, Tensor v, Tensor(a!)[] kv_cache, str slot, *, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
        write_kv,
        _fake_write,
    ),
)
"""(name, schema, implementation, fake). An operator's only output is new memory, or ``out`` and the cache it writes."""

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call] # lives as long as this module: operators go when it does

for _name, _schema, _real, _fake in _OPERATORS:
    # cudagraph_unsafe: kernels may read host values of their plan, which a graph that torch captures would freeze.
    # Engines that capture plan with capture=, and know what they replay.
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
