"""What a dense role keeps for one step: every sequence's tiles, and the gathers that feed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from attn_core.backends.torch_native.setup import Setup
from attn_core.backends.torch_native.sources import KV, PagedReader, Pages, RaggedReader, Scratch, narrowed
from attn_core.backends.torch_native.splits import Cut, cut
from attn_core.backends.torch_native.tiles import MAX_ROWS, Seq, Strips, Tile, rows_per_tile, tiles
from attn_core.runtime.batch import Batch
from attn_core.runtime.plan import Capture

PART_BYTES = 8 << 20
"""k and v that decode gathers at a time. Longer contexts are read in parts of about this size and joined: the buffer
stays in cache and never grows with the context."""
JOIN_ELEMENTS = 1 << 16
"""Output elements joined at a time: enough to spread the cost of the operations, few enough to stay in cache."""


@dataclass(frozen=True, slots=True)
class Feed:
    """A tile with what it reads."""

    tile: Tile
    kv: KV
    cut: Cut | None = None
    """Decode only: ``kv`` holds stretches of keys along its first axis."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One gather, and the tiles it feeds."""

    pages: Pages
    feeds: list[Feed]


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a step."""

    row: int
    token: int
    """First query token."""
    key: int
    """First row of ragged k and v."""
    kv_len: int
    direct: bool
    """k and v may be taken as they are given."""
    tiles: list[Tile]
    fetches: list[Fetch]
    """None needed where all is ragged. Several: parts of one query's keys, to be merged."""


@dataclass(frozen=True, slots=True)
class Group:
    """Decode rows that are joined together: each has its result in ``count`` pieces, over disjoint keys."""

    count: int
    first: int
    """Row of the first sequence."""
    sequences: list[Sequence]


@dataclass(slots=True)
class Step:
    """The plan of one role: refilled every step, its buffers and strips stay."""

    scratch: Scratch
    strips: Strips
    paged: PagedReader | None
    ragged: RaggedReader | None
    sequences: list[Sequence] = field(default_factory=list)
    one_by_one: bool = False
    """Decode only: every row is one query."""
    groups: list[Group] = field(default_factory=list)
    """Such rows again, as they are joined."""
    alike: Tile | None = None
    """Prefill and encode: the one tile of every sequence, where all have the same and none needs a mask or pages."""


def planner(s: Setup) -> Callable[..., Step]:
    """The role's plan function."""

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> Step:
        """Reads the lengths, from the device where only it knows them."""
        step: Step = _new(s) if out is None else out
        queries = batch.lengths.queries
        keys: list[int] = list(batch.lengths.keys) if batch.exact else batch.kv_lens_device.tolist()
        if s.new_only:
            keys = list(queries)
        step.one_by_one = s.packed and max(queries) == 1
        part = _part_tokens(s) if step.one_by_one and s.fused else 0
        if step.paged is not None:
            longest = max(*keys, capture.max_kv_len if capture is not None else 0)
            step.paged.reserve(min(longest, 2 * part) if part else longest)
        step.sequences = []
        token = key = 0
        for row, (n, m) in enumerate(zip(queries, keys)):
            step.sequences.append(_sequence(s, step, batch, row, (token, key, n, m), part))
            token, key = token + n, key + (n if s.paged else m)
        step.groups = _groups(s, step.sequences) if step.one_by_one else []
        step.alike = _alike(step.sequences)
        return step

    return plan


def _alike(sequences: list[Sequence]) -> Tile | None:
    first = sequences[0].tiles[0]
    same = first.kind in ("full", "causal") and all(
        x.direct and len(x.tiles) == 1 and x.kv_len == first.k1 and _same(x.tiles[0], first) for x in sequences
    )
    return first if same and (first.q0, first.k0) == (0, 0) else None


def _same(a: Tile, b: Tile) -> bool:
    return (a.q0, a.q1, a.k0, a.k1, a.kind) == (b.q0, b.q1, b.k0, b.k1, b.kind)


def _new(s: Setup) -> Step:
    b, scratch, paged = s.b, Scratch(s.device), None
    if s.paged and b.kv_layout is not None and b.page_size is not None and b.kv_dtype is not None:
        paged = PagedReader(b.kv_layout, b.page_size, b.kv_dtype, s.shape, scratch)
    return Step(
        scratch=scratch,
        strips=Strips(s.rules, s.packed_heads, s.device, distances=s.slopes is not None),
        paged=paged,
        ragged=RaggedReader(s.shape, b.dtype, scratch) if s.ragged else None,
    )


def _part_tokens(s: Setup) -> int:
    """Keys per part, whole pages."""
    page = s.b.page_size or 1
    row = s.shape.heads * sum(s.shape.kernel_widths) * s.dtype.itemsize
    return max(1, PART_BYTES // (row * page)) * page


def _sequence(s: Setup, step: Step, batch: Batch, row: int, where: tuple[int, int, int, int], part: int) -> Sequence:
    token, key, n, m = where
    spans = batch.bidirectional_spans[row] if batch.bidirectional_spans is not None else ()
    tree = batch.tree_mask[row] if batch.tree_mask is not None else None
    seq = Seq(n, m, [x for x in spans if x[1] - x[0] > 1], tree)
    window = s.rules.window
    reach = m if window is None else min(m, (1 if s.rules.causal else 2) * window + MAX_ROWS)
    max_rows = rows_per_tile(reach, s.planes)
    groups = [list(tiles(seq, s.rules, max_rows, unbounded=s.unbounded, triangles=s.triangles, device=s.device))]
    if part:
        groups = [[t] for t in _parts(groups[0][0], part)]
    found = [t for group in groups for t in group]
    step.strips.fill(found, max_rows)
    fetches = []
    if step.paged is not None and batch.block_table is not None:
        fetches = [_fetch(s, step.paged, batch.block_table[row], group) for group in groups]
    return Sequence(row, token, key, m, s.ragged and (n == m or not s.paged), found, fetches)


def _parts(tile: Tile, part: int) -> list[Tile]:
    """One query's tile cut into stretches of keys, about equal, that end where pages (and parts) end."""
    keys = tile.k1 - tile.k0
    if tile.kind != "full" or keys < 2 * part:
        return [tile]
    begin = tile.k0 // part * part
    edges = [tile.k0, *range(begin + part, tile.k1 - part // 2, part), tile.k1]
    return [Tile(tile.q0, tile.q1, a, e, "full", tile.shift + tile.k0 - a) for a, e in pairwise(edges)]


def _fetch(s: Setup, reader: PagedReader, table_row: Tensor, group: list[Tile]) -> Fetch:
    seen = [t for t in group if t.kind != "empty"]
    pages = reader.prepare(table_row, min((t.k0 for t in seen), default=0), max((t.k1 for t in seen), default=0))
    return Fetch(pages, [_feed(s, pages, t) for t in group])


def _feed(s: Setup, pages: Pages, t: Tile) -> Feed:
    if not s.packed or t.kind == "empty":
        return Feed(t, narrowed(pages.room.kv, t.k0 - pages.first, t.k1 - pages.first))
    made = cut(t.k1 - t.k0, s.stretches, s.device)
    return Feed(t, made.of_keys(pages.room.kv, t.k0 - pages.first), made)


def _groups(s: Setup, sequences: list[Sequence]) -> list[Group]:
    """Neighbours whose results come in the same number of pieces, as many as fit in JOIN_ELEMENTS."""
    counts = [sum(feed.cut.count for x in seq.fetches for feed in x.feeds if feed.cut) for seq in sequences]
    found: list[Group] = []
    for seq, count in zip(sequences, counts):
        most = max(1, JOIN_ELEMENTS // (count * s.heads * s.b.v_head_dim))
        if not found or found[-1].count != count or len(found[-1].sequences) == most:
            found.append(Group(count, seq.row, []))
        found[-1].sequences.append(seq)
    return found
