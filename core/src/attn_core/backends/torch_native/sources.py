"""Where a sequence's keys and values come from: pages of the cache, or the new tokens of the step as they are.

Both end as four-dimensional views (:data:`KV`) in the dtype the kernel computes in. Pages are gathered into buffers
that the plan keeps: fresh temporaries of this size cost more in page faults than the attention itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.torch_native.float8 import UNIT, unpack
from attn_core.runtime.cache import KVCache

_gather = torch.ops.aten.index_select.out
"""As an operator: the Python function parses its arguments for longer than a short gather takes."""

BYTE_FLOATS = tuple(UNIT)
"""Dtypes that indexing does not know on every device; they move as bytes."""


KV = tuple[Tensor, Tensor]
"""k and v as the kernel takes them, ``(heads, lanes, keys, width)`` or ``(1, heads, keys, width)``."""
Given = Callable[[int, int], KV]
"""``(start, stop)``: these rows of the k and v that a call was given."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernel reads."""

    heads: int
    """Key/value heads."""
    widths: tuple[int, ...]
    """Width of each tensor: k and v, the latent row, or latent and rope."""
    joined: bool
    """The tensors are parts of one row (absorbed MLA, where v is the head of k), not k and v."""
    kernel_widths: tuple[int, ...]
    """Width of each tensor the kernel reads, k and v or the one row: narrower sources end in zeros."""
    v_width: int
    """Columns of v that the kernel reads."""
    lanes: int
    """How often k and v are repeated, by a stride-0 axis, for the query heads that share them; 0: heads come second."""
    dtype: torch.dtype
    """What the kernel computes in."""

    @property
    def wider(self) -> bool:
        """Whether rows must grow (or be joined) on their way."""
        return self.widths != self.kernel_widths

    def offsets(self) -> tuple[int, ...]:
        """Column at which each tensor starts in its output row."""
        return (0, *self.widths[:-1]) if self.joined else (0,) * len(self.widths)

    def arranged(self, keys: tuple[Tensor, ...]) -> KV:
        """``(heads, keys, width)`` tensors, as made or gathered, as what the kernel takes. A joined row is k whole, and
        v in its first ``v_width`` columns."""
        lanes = (-1, self.lanes, -1, -1)
        k, v = keys[0], keys[-1][..., : self.v_width]
        if not self.lanes:
            return k.unsqueeze(0), v.unsqueeze(0)
        return k.unsqueeze(1).expand(lanes), v.unsqueeze(1).expand(lanes)


class Scratch:
    """Flat buffers by name that grow and stay. One per plan: two plans in flight never share one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A view of the buffer, zeros at birth. Growing makes a new one: reserve the largest before taking views."""
        need = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < need:
            flat = self._flat[name] = torch.zeros(need, dtype=dtype, device=self.device)
        return flat[:need].view(shape)


@dataclass(frozen=True, slots=True)
class Room:
    """Views of the buffers for so many pages."""

    landing: tuple[Tensor, ...]
    """For each tensor of the cache, where the gather puts it: the storage dtype, in the layout's order."""
    unpacked: tuple[tuple[Tensor, Tensor], ...]
    """8-bit floats on a CPU: ``(bytes, int16)`` pairs, the second to be filled from the first."""
    staged: tuple[tuple[Tensor, Tensor], ...]
    """Copies ``(to, from)`` that change the dtype or widen the row."""
    kv: KV


@dataclass(frozen=True, slots=True)
class Pages:
    """A stretch of one sequence's pages, ready to be gathered."""

    index: Tensor
    """int32 pages; HND: rows of (page, head)."""
    room: Room
    first: int
    """Position of the first key gathered: the start of a page."""
    run: slice | None = None
    """The pages, where they follow each other in a cache on the host: then a copy does, of any strides."""


class PagedReader:
    """Gathers the pages of one layout. ``prepare`` makes the views of a sequence once per step, ``sources`` those of a
    layer's cache once per call; ``load`` moves the data."""

    sources: Callable[[KVCache], Any]
    """``(cache)``: what ``load`` reads of one layer."""
    load: Callable[[Any, Pages], None]
    """``(sources, pages)``: gather one stretch into its room, which the next ``load`` overwrites."""

    def __init__(self, layout: str, page_size: int, storage: torch.dtype, shape: Shape, scratch: Scratch) -> None:
        self.page_size, self.storage, self.shape, self.scratch = page_size, storage, shape, scratch
        self.by_heads, self.latent = layout == "HND", layout in ("MLA", "MLA_SPLIT")
        self.moves_as = torch.uint8 if storage in BYTE_FLOATS else storage
        self.unpacks = storage in UNIT and scratch.device.type == "cpu"
        self.staging = storage != shape.dtype or shape.wider
        self.reserved = 0
        self.rooms: dict[int, Room] = {}
        plain = not (self.by_heads or self.staging)
        self.sources, self.load = (_data, _load) if plain else (self._sources, self._load_and_stage)

    def reserve(self, keys: int) -> None:
        """Make room for stretches of up to ``keys`` keys, before any view is taken."""
        pages = -(-keys // self.page_size) + 1
        if pages > self.reserved:
            self.reserved = pages
            self.rooms.clear()
            self._room(pages)

    def _room(self, count: int) -> Room:
        """Where ``count`` pages land and become keys. The same buffers for all: sequences take turns."""
        if count in self.rooms:
            return self.rooms[count]
        p, s = self.page_size, self.shape
        landing, unpacked, rows = [], [], []
        for i, width in enumerate(s.widths):
            heads = () if self.latent else (s.heads,)
            shape = (s.heads * count, p, width) if self.by_heads else (count, p, *heads, width)
            values = land = self.scratch.take(f"pages{i}", self.storage, *shape)
            landing.append(land.view(self.moves_as))
            if self.unpacks:
                half = self.scratch.take(f"half{i}", torch.int16, *shape)
                unpacked.append((land.view(torch.int8), half))
                values = half.view(torch.float16)
            heads_first = self.by_heads or self.latent
            rows.append(values.view(s.heads, count * p, width) if heads_first else values.flatten(0, 1).transpose(0, 1))
        keys, staged = tuple(rows), []
        if self.staging:
            keys = tuple(
                self.scratch.take(f"keys{i}", s.dtype, s.heads, count * p, w) for i, w in enumerate(s.kernel_widths)
            )
            for i, (row, at) in enumerate(zip(rows, s.offsets())):
                staged.append((keys[0 if s.joined else i][..., at : at + row.shape[-1]], row))
        self.rooms[count] = room = Room(tuple(landing), tuple(unpacked), tuple(staged), s.arranged(keys))
        return room

    def prepare(self, table_row: Tensor, first: int, end: int) -> Pages:
        """The gather of keys ``first:end`` of a sequence whose pages are ``table_row``."""
        index = table_row[first // self.page_size : -(-end // self.page_size)]
        room, run = self._room(index.shape[0]), None
        if not self.by_heads and self.scratch.device.type == "cpu":
            run = _run(index)
        if self.by_heads:
            heads = torch.arange(self.shape.heads, device=index.device, dtype=index.dtype)
            index = (index * self.shape.heads + heads[:, None]).view(-1)
        return Pages(index, room, first // self.page_size * self.page_size, run)

    def _sources(self, cache: KVCache) -> list[tuple[Tensor, int]]:
        """Each tensor as rows to gather, and for HND how many rows lie between two pages."""
        found = []
        for t in cache.data:
            step = self.shape.heads
            if self.by_heads and step == 1:
                t = t.squeeze(1)
            elif self.by_heads:
                if t.stride(0) % t.stride(1):
                    t = t.contiguous()
                step = t.stride(0) // t.stride(1)
                rows = (t.shape[0] - 1) * step + t.shape[1]
                t = t.as_strided((rows, *t.shape[2:]), t.stride()[1:])
            found.append((t.view(self.moves_as), step))
        return found

    def _load_and_stage(self, sources: list[tuple[Tensor, int]], pages: Pages) -> None:
        heads, room = self.shape.heads, pages.room
        for (source, step), landing in zip(sources, room.landing):
            index = pages.index
            if step != heads:
                index = index // heads * step + index % heads
            if pages.run is None:
                _gather(source, 0, index, out=landing)
            else:
                landing.copy_(source[pages.run])
        for stored, half in room.unpacked:
            unpack(stored, self.storage, half)
        for to, of in room.staged:
            to.copy_(of)


def _data(cache: KVCache) -> tuple[Tensor, ...]:
    return cache.data


def _load(sources: tuple[Tensor, ...], pages: Pages) -> None:
    for source, landing in zip(sources, pages.room.landing):
        if pages.run is None:
            _gather(source, 0, pages.index, out=landing)
        else:
            landing.copy_(source[pages.run])


def _run(index: Tensor) -> slice | None:
    count = index.shape[0]
    first = int(index[0]) if count else 0
    if not count or int(index[-1]) - first != count - 1 or not bool((index.diff() == 1).all()):
        return None
    return slice(first, first + count)


class RaggedReader:
    """The new tokens' own k and v, already in memory."""

    def __init__(self, shape: Shape, given: torch.dtype, scratch: Scratch) -> None:
        self.shape, self.scratch = shape, scratch
        self.staged = tuple(given != shape.dtype or w != wide for w, wide in zip(shape.widths, shape.kernel_widths))

    def given(self, tensors: tuple[Tensor, ...]) -> Given:
        """:meth:`load` for one call. What needs no copy is arranged once for all sequences."""
        if any(self.staged):
            return lambda start, stop: self.load(tensors, start, stop)
        whole = self.shape.arranged(tuple(t.transpose(0, 1) for t in tensors))

        def load(start: int, stop: int) -> KV:
            if stop - start >= COMPACT_FROM:
                return self.load(tensors, start, stop)
            return narrowed(whole, start, stop)

        return load

    def load(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> KV:
        """Rows ``start:stop`` of k and v; long runs are copied to lie head by head."""
        s, out = self.shape, []
        compact = stop - start >= COMPACT_FROM
        for i, (t, staged) in enumerate(zip(tensors, self.staged)):
            rows = t[start:stop].transpose(0, 1)
            if staged or compact:
                room = self.scratch.take(f"new{i}", s.dtype, s.heads, stop - start, s.kernel_widths[i])
                room[..., : rows.shape[-1]].copy_(rows)
                rows = room
            out.append(rows)
        return s.arranged(tuple(out))


def narrowed(kv: KV, k0: int, k1: int) -> KV:
    """Keys ``k0:k1`` of both."""
    if k0 == 0 and k1 == kv[0].shape[2]:
        return kv
    return kv[0].narrow(2, k0, k1 - k0), kv[1].narrow(2, k0, k1 - k0)


COMPACT_FROM = 512
"""Tokens from which it pays to copy q, k and v so that each head is contiguous: attention reads k and v once per block
of queries, and the stride over all heads costs it more than the copy (AVX-512: 3 % at 1k, 6 % at 4k)."""
