"""What runs the layers of a bound group: a padded batch of transformers is packed, attended to, and padded again.

The mask is read and the plan filled once per forward of the model and kind of layer: layers of one forward hand over
the very same mask. Plans are per thread, since a server may run one model in several.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_core.integrations.hf_keys import KeyPages, Paging
from attn_core.integrations.hf_mask import Rows, read_mask
from attn_core.runtime import Batch, BoundGroup, Plan

Strides = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class _Step:
    """One forward of the model as one group sees it."""

    mask: weakref.ref[Tensor] | None
    shape: tuple[int, int, int]
    """Sequences, queries and keys of the padded batch."""
    strides: Strides
    """Of k and v, where they become pages."""
    rows: Rows
    places: Tensor | None
    paging: Paging | None
    plan: Plan | None
    """None where no token is real."""
    callers: set[Hashable] = field(default_factory=set)
    """Layers that used it. A layer that comes again begins another forward, whose mask may have changed in place."""

    def serves(self, caller: Hashable, mask: Tensor | None, shape: tuple[int, int, int], strides: Strides) -> bool:
        if shape != self.shape or strides != self.strides:
            return False
        if mask is None:
            return self.mask is None
        return self.mask is not None and self.mask() is mask and caller not in self.callers


class Runner:
    """Runs the layers of one group: encoders over k and v as they are, all others over them as pages."""

    def __init__(self, group: BoundGroup) -> None:
        self.group = group
        self.pages = KeyPages(group) if group.spec.cached else None
        self._here = threading.local()

    def __call__(
        self,
        caller: Hashable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        sinks: Any = None,
        bias: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """q ``(batch, heads, queries, width)``, k and v with their own heads and all keys; returns ``(batch, queries,
        heads, width)``.

        ``sinks`` as ``prepare_sinks`` made them; ``bias`` ``(1 or batch, 1 or heads, queries, keys)``; ``indices``
        ``(batch, queries, topk)`` places of keys. Rows of padding tokens are zeros, as flash implementations leave
        them. Raises :class:`AttnCoreError` for masks that say more than the group's rules and padding.
        """
        batch, heads, length, _ = q.shape
        strides = (k.stride(), v.stride()) if self.pages is not None else ((), ())
        step = self._step(caller, mask, (batch, length, k.shape[2]), strides, k, v)
        rows, places = step.rows, step.places
        new = q.new_empty if places is None else q.new_zeros
        padded = new((batch * length, heads, v.shape[-1]))
        if step.plan is not None:
            more = {
                "sinks": sinks,
                "bias": None if bias is None else _own_bias(bias, rows, batch),
                "indices": None if indices is None else _own_indices(indices, rows, places),
            }
            packed = _pack(q, places)
            given: tuple[Any, ...]
            if self.pages is not None and step.paging is not None:
                given = (packed, None, None, self.pages.wrap(k, v, step.paging), step.plan)
            else:
                given = (packed, _pack(k, places), _pack(v, places), None, step.plan)
            if places is None:
                self.group.forward(*given, **more, out=padded)
            else:
                padded.index_copy_(0, places, self.group.forward(*given, **more))
        return padded.view(batch, length, heads, -1)

    def _step(
        self, caller: Hashable, mask: Tensor | None, shape: tuple[int, int, int], strides: Strides, k: Tensor, v: Tensor
    ) -> _Step:
        here: Any = self._here
        step: _Step | None = getattr(here, "step", None)
        if step is None or not step.serves(caller, mask, shape, strides):
            here.step = None  # a mask that is refused leaves nothing behind
            rows = read_mask(mask, self.group.spec, *shape)
            paging = None if self.pages is None else self.pages.paging(k, v, rows)
            plan = None
            if rows.sequences:
                plan = here.plan = self.group.plan(self._batch(rows, paging), out=getattr(here, "plan", None))
            places = rows.places(*shape[:2], k.device)
            known = None if mask is None else weakref.ref(mask)
            step = here.step = _Step(known, shape, strides, rows, places, paging, plan)
        step.callers.add(caller)
        return step

    def _batch(self, rows: Rows, paging: Paging | None) -> Batch:
        group, table = self.group, None
        if self.pages is not None and paging is not None:
            table = self.pages.table(paging, rows).to(group.torch_device)
        return Batch(
            rows.query_lens, rows.kv_lens, block_table=table, attn_type=group.spec.attn_type, device=group.torch_device
        )


def _pack(x: Tensor, places: Tensor | None) -> Tensor:
    """``(batch, heads, length, width)`` as ``(tokens, heads, width)``; no copy where the model only transposed."""
    flat = x.transpose(1, 2).flatten(0, 1)
    if places is not None:
        return flat.index_select(0, places)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _own_bias(bias: Tensor, rows: Rows, batch: int) -> Tensor:
    """``bias`` as kernels count it: by sequence, from its first query and first key."""
    if not any(rows.first_query) and not any(rows.first_key):
        whole = bias.shape[0] == 1 or rows.sequences == tuple(range(batch))
        return bias if whole else bias[list(rows.sequences)]
    own = bias.new_zeros(len(rows.sequences), bias.shape[1], max(rows.query_lens), max(rows.kv_lens))
    for i, (s, q, n, a, m) in enumerate(
        zip(rows.sequences, rows.first_query, rows.query_lens, rows.first_key, rows.kv_lens)
    ):
        own[i, :, :n, :m] = bias[s if bias.shape[0] > 1 else 0, :, q : q + n, a : a + m]
    return own


def _own_indices(indices: Tensor, rows: Rows, places: Tensor | None) -> Tensor:
    """``(batch, queries, topk)`` as kernels count them, ``(tokens, topk)``, from each sequence's first key. What lies
    before it gets a negative number, which means none."""
    flat = indices.flatten(0, 1)
    flat = flat if places is None else flat[places]
    if not any(rows.first_key):
        return flat
    shift = torch.tensor(rows.first_key, dtype=flat.dtype).repeat_interleave(torch.tensor(rows.query_lens))
    return flat - shift.to(flat.device)[:, None]
