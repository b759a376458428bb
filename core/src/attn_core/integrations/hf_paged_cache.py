"""One paged cache of transformers, under our kernels: its layers wrapped, its steps planned, its rings kept right."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.integrations.hf_paged_step import WRITTEN_FOR, Aside, Part, Step, read
from attn_core.runtime import BoundGroup, KVCache, Plan, wrap_kv_cache

_LAYOUT = "NHD"
GEOMETRY = {"page_size": 1, "kv_layout": _LAYOUT}
"""What transformers' cache is, whatever page size it allocates by: a row is ``(kv heads, head_dim)`` of one token."""


class Cache:
    """One PagedAttentionCache of transformers: its layers wrapped, its kinds of layers with their plans."""

    def __init__(self) -> None:
        self.layers: dict[int, KVCache] = {}
        self.kinds: dict[str, Kind] = {}
        self.scratch: KVCache | None = None
        self.carried = 0

    def attend(
        self,
        group: BoundGroup,
        layer: int,
        theirs: Any,
        packed: tuple[Tensor, ...],
        sinks: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """q, k, v ``(tokens, heads, width)`` in, ``(tokens, heads, width)`` out; padding tokens give zeros."""
        q, k, v = packed
        cache = self.layers.get(layer)
        if cache is None:
            cache = self.layers[layer] = wrapped(theirs, layer, group)
        kind = self.kinds.setdefault(group.name, Kind())
        step = kind.step(group, theirs.layer_to_allocator[layer], kwargs)
        self.carried = 0
        whole = step.aside is None and step.here is not None and step.here.tokens is None
        if whole and step.num_tokens == len(q):
            out: Tensor = group.forward(q, k, v, cache, kind.here, sinks=sinks)
            return out
        out = q.new_zeros((len(q), q.shape[1], v.shape[2]))
        if step.here is not None:
            rows = _rows(step, step.here)
            out[rows] = group.forward(q[rows], k[rows], v[rows], cache, kind.here, sinks=sinks)
        if step.aside is not None:
            rows = _rows(step, step.aside)
            new = k[rows], v[rows]
            scratch = self._room(step.aside, cache)
            for kept, source in zip(scratch.data, cache.data):
                kept[step.aside.carried_to] = source[step.aside.carried_from]
            out[rows] = group.forward(q[rows], *new, scratch, kind.aside, sinks=sinks)
            for target, rows_of in zip(cache.data, new):
                target.index_copy_(0, step.aside.stored_to, rows_of.unsqueeze(1))
            self.carried = len(step.aside.carried_from)
        return out

    def _room(self, aside: Aside, like: KVCache) -> KVCache:
        """The scratch cache, which all sliding layers use one after the other; it only grows."""
        if self.scratch is None or self.scratch.num_pages < aside.size:
            size = 1 << aside.size.bit_length()
            made = [t.new_zeros((size, *t.shape[1:])) for t in like.data]
            self.scratch = wrap_kv_cache(*made, layout=_LAYOUT)
        return self.scratch


class Kind:
    """The layers of one group: what the step that runs now is for them."""

    def __init__(self) -> None:
        self.here: Plan | None = None
        self.aside: Plan | None = None
        self._of: Any = None
        self._step: Step | None = None

    def step(self, group: BoundGroup, allocator: Any, kwargs: dict[str, Any]) -> Step:
        """Read and planned at the first layer. The list of ``write_index`` is made for every step and reaches all
        layers as it is; holding it keeps its identity from being given to another."""
        if self._step is None or self._of is not kwargs["write_index"]:
            self._step = self._of = None  # a step that fails leaves nothing behind
            step = read(kwargs, allocator.layer_type, allocator.index, group.spec.sliding_window)
            if step.here is not None:
                self.here = group.plan(step.here.batch, out=self.here)
            if step.aside is not None:
                self.aside = group.plan(step.aside.batch, out=self.aside)
            self._step, self._of = step, kwargs["write_index"]
        return self._step


def _rows(step: Step, part: Part) -> Any:
    return slice(0, step.num_tokens) if part.tokens is None else part.tokens


def wrapped(theirs: Any, layer: int, group: BoundGroup) -> KVCache:
    """A layer's rows of transformers' cache, without a copy: keys and values are two views of one tensor, in which the
    same number means the same token. The values' view starts later and so ends first."""
    try:
        allocator = theirs.layer_to_allocator[layer]
        k, v = allocator._kv_token_views[layer]
    except (AttributeError, KeyError) as e:
        raise AttnCoreError(f"transformers' paged cache is not the one known here ({e!r}); {WRITTEN_FOR}") from e
    check_window(layer, getattr(allocator, "sliding_window", None), group)
    rows = min(len(k), len(v))
    return wrap_kv_cache(k[:rows].unsqueeze(1), v[:rows].unsqueeze(1), layout=_LAYOUT)


def check_window(layer: int, kept: int | None, group: BoundGroup) -> None:
    if kept != group.spec.sliding_window:
        raise AttnCoreError(
            f"layer {layer}: transformers keeps the keys of a window of {kept}, the decision was made for "
            f"{group.spec.sliding_window} (group {group.name!r})"
        )
