"""The step as a list of work for the kernel, balanced on the host from lengths alone.

Each sequence's rows are cut into tiles of ``block_m``, and the keys of a tile into pieces where one program would take
too long over them: long contexts, and steps with too few tiles to fill the device. Pieces leave partial results that
``merge`` joins. Longest pieces come first, so that the last programs to start are short ones.

Lengths may be upper bounds: a piece says which keys *from the first visible one on* it takes, and the kernel works out
on the device where that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_KEYS = 256
"""Keys of a piece at least: below, the partial results cost more than the keys."""
FIXED_PIECES = 8
"""Pieces per tile at most where results must not depend on the rest of the batch."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is known of a group's steps when it is bound."""

    group: int
    """Rows per query token: query heads per key/value head."""
    block_m: int
    block_n: int
    programs: int
    """How many lines of work fill the device: its multiprocessors times the programs on each, per kv head."""
    causal: bool
    reach: int | None
    """Keys one token sees at most, by window or chunk; None: all."""
    two_sided: int = 0
    """Keys after its own position that a token's window shows (not causal)."""
    topk: int | None = None
    everything: bool = False
    """Tree masks and spans: a tile may see any key."""
    fixed: bool = False
    """Cut a tile by its own length only."""

    def tiles(self, queries: Tensor) -> Tensor:
        """Tiles of each sequence. With ``topk`` every token has its own keys, hence its own tiles."""
        if self.topk is not None:
            return queries * -(-self.group // self.block_m)
        return (queries * self.group + (self.block_m - 1)) // self.block_m

    def most_keys(self, queries: Tensor, keys: Tensor, last: Tensor) -> Tensor:
        """Upper bound of the keys that tiles see, whose last token is ``last`` of ``queries``; for any length up to
        ``keys``, and with what aligning to blocks adds."""
        if self.topk is not None:
            return torch.full_like(keys, self.topk)
        if self.everything:
            return keys
        most = torch.minimum(keys, keys - queries + last + 1) if self.causal else keys
        if self.reach is not None:
            tokens = -(-self.block_m // self.group) + 1
            most = most.clamp(max=self.reach + self.two_sided + tokens + self.block_n)
        return most.clamp(min=0)

    def capacity(self, rows: int, width: int, max_kv_len: int) -> tuple[int, int, int]:
        """Lines of work, partial results and merges that decode steps up to this size can need."""
        tiles = int(self.tiles(torch.tensor([width]))) * rows
        if self.fixed:
            pieces = min(FIXED_PIECES, -(-max_kv_len // FEWEST_KEYS))
            return tiles * pieces, tiles * pieces, tiles
        extra = min(self.programs, tiles * -(-max_kv_len // FEWEST_KEYS))
        return tiles + extra, 2 * extra, min(extra, tiles)


@dataclass(frozen=True, slots=True)
class Work:
    """One step, on the host."""

    lines: Tensor
    """int32 ``(pieces, 5)``: sequence, first row, first and end key (from the first visible one), partial or -1."""
    merges: Tensor
    """int32 ``(split tiles, 4)``: sequence, first row, first partial, partials."""
    partials: int


def schedule(shape: Shape, queries: Tensor, keys: Tensor) -> Work:
    """``queries`` and ``keys`` int32 ``(sequences,)`` on the host."""
    queries, keys = queries.long(), keys.long()
    counts = shape.tiles(queries)
    sequence = torch.repeat_interleave(counts)
    place = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    if shape.topk is None:
        first_row = place * shape.block_m
    else:
        per_token = -(-shape.group // shape.block_m)
        first_row = place // per_token * shape.group + place % per_token * shape.block_m
    queries, keys = queries[sequence], keys[sequence]
    last = torch.minimum((first_row + (shape.block_m - 1)) // shape.group, queries - 1)
    most = shape.most_keys(queries, keys, last)
    if shape.fixed:
        pieces = (-(-most // FEWEST_KEYS)).clamp(1, FIXED_PIECES)
    else:
        ideal = max(FEWEST_KEYS, -(-int(most.sum()) // shape.programs))
        pieces = (-(-most // ideal)).clamp(min=1)
    size = _up(-(-most // pieces), shape.block_n)
    pieces = (-(-most // size.clamp(min=1))).clamp(min=1)
    split = pieces > 1

    tile = torch.repeat_interleave(pieces)
    number = torch.arange(len(tile)) - (pieces.cumsum(0) - pieces)[tile]
    slots = torch.where(split, pieces, 0)
    first_slot = slots.cumsum(0) - slots
    begin = number * size[tile]
    partial = torch.where(split[tile], first_slot[tile] + number, -1)
    lines = torch.stack((sequence[tile], first_row[tile], begin, begin + size[tile], partial), 1)
    lines = lines[torch.argsort(torch.minimum(size, most)[tile], descending=True, stable=True)]
    merges = torch.stack((sequence, first_row, first_slot, pieces), 1)[split]
    return Work(lines.int(), merges.int(), int(slots.sum()))


def _up(n: Tensor, step: int) -> Tensor:
    """The next multiple of ``step``."""
    return -(-n // step) * step
