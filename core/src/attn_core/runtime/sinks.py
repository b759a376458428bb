"""Attention sinks, prepared once per layer: each kernel's heads, dtype and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import BadInputError
from attn_core.runtime.adapt import Attend
from attn_core.runtime.bind import Bound


def per_role(bound: Mapping[str, Bound]) -> bool:
    """Whether the kernels want different forms. One module-level ``prepare_sinks`` for all roles says they do not."""
    return len({(b.kernels.prepare_sinks, b.fit.more_heads) for b in bound.values()}) > 1


def with_own(call: Attend, role: str) -> Attend:
    """A kernel that wants sinks prepared otherwise than the group's other one: picks its form out of the mapping."""

    def attend(q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *, sinks: Any = None, **rest: Any) -> Any:
        return call(q, k, v, kv_cache, plan, sinks=None if sinks is None else sinks[role], **rest)

    return attend


def preparer(where: str, num_heads: int, bound: Mapping[str, Bound], device: torch.device) -> Callable[[Tensor], Any]:
    """``prepare_sinks`` of a group whose attention roles are ``bound``."""
    makers = {role: _maker(b, device) for role, b in bound.items()}
    own = per_role(bound)

    def prepare_sinks(sinks: Tensor) -> Any:
        """A layer's sinks ``(num_heads,)`` as the kernels want them; once per layer.

        Kernels that disagree get a mapping by role, which ``forward`` and their wrappers read.
        Raises :class:`BadInputError` for another shape.
        """
        if tuple(sinks.shape) != (num_heads,):
            raise BadInputError(f"{where}: sinks have shape {tuple(sinks.shape)}, expected ({num_heads},)")
        if own:
            return {role: make(sinks) for role, make in makers.items()}
        return next(iter(makers.values()))(sinks)

    return prepare_sinks


def _maker(b: Bound, device: torch.device) -> Callable[[Tensor], Any]:
    fit, prepare = b.fit, b.kernels.prepare_sinks

    def make(sinks: Tensor) -> Any:
        wide = fit.grow_heads(sinks, 0) if fit.more_heads else sinks
        return wide.to(device, torch.float32).contiguous() if prepare is None else prepare(wide.to(device))

    return make
