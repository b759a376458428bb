"""Which keys each query sees, as a short list of rectangles with masks: made once per step, on the host.

A *tile* is a run of queries against a run of keys. Windows and chunks become the tile's key range; only what a range
cannot say becomes a mask. A band (causality, a window) looks the same from every tile, shifted, so that one *strip* per
plan serves all of them as slices; spans and tree masks get a mask of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 256
"""Queries per tile where a mask is needed: bounds masks, and the keys a window drags in for nothing."""
SHORT, SHORT_ROWS = 512, 128
"""Fewer queries per tile where they reach no further than this: what a tile's upper rows cannot see is wasted."""
TRIANGLE_FROM = 1024
"""Queries above which the kernel's own causality is faster than bands. It skips keys in blocks of 512 only, so short
prompts lose up to half of the work to it; long ones lose little, and larger tiles run 8 % faster."""
MAX_SCORES = 1 << 22
"""Mask elements, or scores written out, held at once: 16 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who sees whom, by positions alone. Query i sits at ``kv_len - query_len + i`` if causal, else at ``i``."""

    causal: bool
    window: int | None = None
    """W tokens including the token itself; not causal: |i - j| < W."""
    chunk: int | None = None

    def keys(self, position: int, kv_len: int) -> tuple[int, int]:
        """First key seen and the one after the last; ``first >= end`` when there is none."""
        first, end = 0, position + 1 if self.causal else kv_len
        if self.window is not None:
            first = position - self.window + 1
            end = min(end, position + self.window)
        if self.chunk is not None:
            start = position // self.chunk * self.chunk
            first, end = max(first, start), min(end, start + self.chunk)
        return max(first, 0), min(end, kv_len)

    def visible(self, start: int, stop: int, k0: int, k1: int, device: torch.device) -> Tensor:
        """bool ``(stop - start, k1 - k0)`` for the queries at positions ``start:stop`` and the keys ``k0:k1``."""
        q = torch.arange(start, stop, device=device)[:, None]
        k = torch.arange(k0, k1, device=device)
        seen = k <= q if self.causal else torch.ones(stop - start, k1 - k0, dtype=torch.bool, device=device)
        if self.window is not None:
            seen &= (q - k).abs() < self.window
        if self.chunk is not None:
            seen &= q // self.chunk == k // self.chunk
        return seen


@dataclass(frozen=True, slots=True)
class Seq:
    """One sequence as the tiler sees it."""

    query_len: int
    kv_len: int
    spans: Sequence[tuple[int, int]] = ()
    """Key positions that see each other in both directions."""
    tree: Tensor | None = None
    """bool ``(query_len, query_len)``: replaces the rules among the new tokens."""

    def spans_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Spans that hold some position in ``start:stop``."""
        return [s for s in self.spans if s[0] < stop and start < s[1]]


@dataclass(slots=True)
class Tile:
    """Queries ``q0:q1`` against keys ``k0:k1``, both counted within their sequence."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: str
    """``full``; ``causal``: square and lower triangular; ``band``: by the rules; ``mask``: its own; ``empty``."""
    shift: int = 0
    """Position of the first query less ``k0``: where this tile lies in the strip."""
    mask: Tensor | None = None
    """Added to the scores: float32 ``(1, 1, rows, keys)`` of 0 and -inf."""
    distance: Tensor | None = None
    """float32 ``(1, 1, rows, keys)``: -|key position - query position|, for alibi."""


def rows_per_tile(kv_len: int, planes: int) -> int:
    """A power of two that keeps ``planes`` score matrices of a tile within MAX_SCORES.

    Depends on the sequence alone, never on its neighbours: results do not change with the rest of the batch.
    """
    fits = max(1, MAX_SCORES // (planes * max(kv_len, 1)))
    return min(SHORT_ROWS if kv_len <= SHORT else MAX_ROWS, 1 << (fits.bit_length() - 1))


def tiles(
    seq: Seq, rules: Rules, max_rows: int, *, unbounded: bool, triangles: bool, device: torch.device
) -> Iterator[Tile]:
    """Cut one sequence into tiles. Every query is in exactly one; queries that see nothing are in ``empty`` ones.

    ``unbounded``: the kernel holds no scores, so a tile without a mask may have any size. ``triangles``: it also knows
    square causality by itself.
    """
    n, m = seq.query_len, seq.kv_len
    offset = m - n if rules.causal else 0
    if seq.tree is not None:
        yield _masked(seq, rules, 0, n, offset, device)
        return
    if n == 1 and not seq.spans:
        first, end = rules.keys(offset, m)
        yield Tile(0, 1, first, end, "full", offset - first) if first < end else Tile(0, 1, 0, 0, "empty")
        return
    chunk = rules.chunk
    triangles = triangles and rules.causal and not seq.spans and (rules.window is None or rules.window >= m)
    row = 0
    while row < n:
        position = offset + row
        first, end = rules.keys(position, m)
        limit = n if chunk is None else min(n, row + chunk - position % chunk)
        if first >= end:
            stop = row + 1
            while stop < n and _blind(rules, offset + stop, m):
                stop += 1
            yield Tile(row, stop, 0, 0, "empty")
        elif triangles and first == position and limit - row > TRIANGLE_FROM:
            stop = limit
            yield Tile(row, stop, first, offset + stop, "causal")
        else:
            stop = min(limit, row + max_rows)
            if unbounded and not seq.spans and _same_keys(rules, position, offset + limit - 1, m):
                stop = limit
            while _blind(rules, offset + stop - 1, m):
                stop -= 1
            if seq.spans_in(position, offset + stop):
                yield _masked(seq, rules, row, stop, offset, device)
            else:
                whole = _same_keys(rules, position, offset + stop - 1, m)
                last_end = rules.keys(offset + stop - 1, m)[1]
                yield Tile(row, stop, first, last_end, "full" if whole else "band", position - first)
        row = stop


def _same_keys(rules: Rules, start: int, last: int, kv_len: int) -> bool:
    """Whether the queries from ``start`` to ``last`` all see the same keys (ranges only ever move to the right)."""
    return rules.keys(start, kv_len) == rules.keys(last, kv_len)


def _blind(rules: Rules, position: int, kv_len: int) -> bool:
    first, end = rules.keys(position, kv_len)
    return first >= end


def _masked(seq: Seq, rules: Rules, row: int, stop: int, offset: int, device: torch.device) -> Tile:
    """Rows ``row:stop`` with a mask of their own: the rules, then the tree, then the spans."""
    start, end = offset + row, offset + stop
    if start < 0:  # a padding row (kv length 1) of a verify batch: its result is never read
        return Tile(row, stop, 0, 0, "empty")
    spans = seq.spans_in(start, end)
    k0 = min(rules.keys(start, seq.kv_len)[0], start, *(s for s, _ in spans))
    k1 = max(rules.keys(end - 1, seq.kv_len)[1], end, *(e for _, e in spans))
    seen = rules.visible(start, end, k0, k1, device)
    if seq.tree is not None:
        seen[:, start - k0 : end - k0] = seq.tree
    for s, e in spans:
        seen[max(s, start) - start : min(e, end) - start, s - k0 : e - k0] = True
    return Tile(row, stop, k0, k1, "mask", start - k0, additive(seen))


def additive(seen: Tensor) -> Tensor:
    """bool ``(rows, keys)`` as the float32 mask ``(1, 1, rows, keys)`` that is added to scores."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))[None, None]


class Strips:
    """Masks and distances of bands. Kept from step to step, and made anew only when a step needs a larger one."""

    def __init__(self, rules: Rules, repeat: int, device: torch.device, *, distances: bool) -> None:
        self.rules, self.repeat, self.device, self.distances = rules, repeat, device, distances
        """``repeat``: consecutive rows per query (a group's heads, when they are packed into the queries)."""
        self._by_rows: dict[int, _Strip] = {}

    def fill(self, found: Sequence[Tile], max_rows: int) -> None:
        """Give every band its mask, every mask its packed rows, and every tile its distances where asked."""
        need = [t for t in found if t.kind == "band" or (self.distances and t.kind != "empty")]
        for t in found:
            if t.kind == "mask" and t.mask is not None and self.repeat > 1:
                t.mask = t.mask.repeat_interleave(self.repeat, 2)
        if not need:
            return
        strip = self._by_rows.get(max_rows)
        left, right = max(t.shift for t in need), max(t.k1 - t.k0 - t.shift for t in need)
        if strip is None or left > strip.left or right > strip.right:
            old = (0, 0) if strip is None else (strip.left, strip.right)
            strip = _Strip(self, max_rows, *(max(-(-new // 256) * 256, have) for new, have in zip((left, right), old)))
            self._by_rows[max_rows] = strip
        for t in need:
            at = strip.left - t.shift
            where = (None, None, slice((t.q1 - t.q0) * self.repeat), slice(at, at + t.k1 - t.k0))
            if t.kind == "band":
                t.mask = strip.mask[where]
            if strip.distance is not None:
                t.distance = strip.distance[where]


class _Strip:
    """Column c lies ``c - left`` keys to the right of a tile's first query."""

    def __init__(self, of: Strips, rows: int, left: int, right: int) -> None:
        self.left, self.right = left, right
        queries = torch.arange(rows, device=of.device).repeat_interleave(of.repeat)
        ahead = torch.arange(-left, right, device=of.device) - queries[:, None]
        seen = ahead <= 0 if of.rules.causal else torch.ones_like(ahead, dtype=torch.bool)
        if of.rules.window is not None:
            seen &= ahead.abs() < of.rules.window
        self.mask = additive(seen)[0, 0]
        self.distance = -ahead.abs().float() if of.distances else None
