"""The list of work: every key of every row in exactly one piece, whatever the lengths turn out to be."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_core.backends.triton import schedule as module
from attn_core.backends.triton.schedule import Shape, schedule


def shape(**fields) -> Shape:
    return Shape(**{"group": 4, "block_m": 16, "block_n": 32, "programs": 64, "causal": True, "reach": None, **fields})


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def visible(s: Shape, position: int, kv_len: int, window: int | None, chunk: int | None) -> tuple[int, int]:
    first, end = 0, min(kv_len, position + 1) if s.causal else kv_len
    if window is not None:
        first, end = max(first, position - window + 1), min(end, position + window)
    if chunk is not None:
        start = position // chunk * chunk
        first, end = max(first, start), min(end, start + chunk)
    return first, end


def check_cover(s: Shape, queries, bounds, true, window=None, chunk=None) -> None:
    """As the kernel reads a line: keys count from the tile's first visible block on."""
    work = schedule(s, ints(*queries), ints(*bounds))
    lines = work.lines.tolist()
    tiles: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for sequence, row, begin, end, partial in lines:
        tiles.setdefault((sequence, row), []).append((begin, end, partial))
    rows = {(i, r) for i, n in enumerate(queries) for r in range(0, n * s.group, s.block_m)}
    assert set(tiles) == rows
    for (sequence, row), pieces in tiles.items():
        n, m = queries[sequence], true[sequence]
        offset = m - n if s.causal else 0
        tokens = range(row // s.group, min((row + s.block_m - 1) // s.group, n - 1) + 1)
        seen = [visible(s, offset + t, m, window, chunk) for t in tokens]
        low, high = max(seen[0][0], 0) // s.block_n * s.block_n, seen[-1][1]
        if len(pieces) == 1:
            assert pieces[0][2] == -1
            continue
        ordered = sorted(pieces)
        assert ordered[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ordered))
        assert low + ordered[-1][1] >= high
        assert all(begin % s.block_n == end % s.block_n == 0 for begin, end, _ in ordered)
    found = sorted(p for _, _, _, _, p in lines if p >= 0)
    assert found == list(range(work.partials))
    of_merges = [(i, r, f, c) for i, r, f, c in work.merges.tolist()]
    assert {(i, r): (f, c) for i, r, f, c in of_merges} == {
        key: (min(p for _, _, p in pieces), len(pieces)) for key, pieces in tiles.items() if len(pieces) > 1
    }
    for key, pieces in tiles.items():  # merge reads a tile's partials one after the other
        assert len(pieces) == 1 or [p for _, _, p in sorted(pieces)] == sorted(p for _, _, p in pieces), key


@given(st.data())
def test_every_key_is_in_exactly_one_piece(data):
    draw = data.draw
    window = draw(st.none() | st.integers(1, 3000))
    chunk = draw(st.none() | st.integers(1, 3000))
    reaches = [r for r in (window, chunk) if r is not None]
    causal = draw(st.booleans())
    s = shape(
        group=draw(st.sampled_from([1, 3, 4, 16, 128])), block_m=draw(st.sampled_from([16, 64])),
        programs=draw(st.integers(1, 300)), causal=causal, reach=min(reaches, default=None),
        two_sided=0 if causal or not reaches else max(reaches), fixed=draw(st.booleans()),
    )  # fmt: skip
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 70), st.integers(0, 5000), st.integers(0, 2000)), min_size=1, max_size=6)
    )
    queries = [n for n, _, _ in sizes]
    true = [n + more for n, more, _ in sizes]
    bounds = [m + slack for m, (_, _, slack) in zip(true, sizes)]
    check_cover(s, queries, bounds, true, window, chunk)


@given(st.data())
def test_a_captured_plan_holds_every_step_up_to_its_size(data):
    draw = data.draw
    rows, width, longest = draw(st.integers(1, 40)), draw(st.integers(1, 5)), draw(st.integers(5, 40000))
    s = shape(
        programs=draw(st.integers(1, 300)), fixed=draw(st.booleans()), reach=draw(st.none() | st.integers(1, 9000))
    )
    lengths = draw(st.lists(st.integers(1, longest), min_size=rows, max_size=rows))
    work = schedule(s, ints(*[width] * rows), ints(*lengths))
    lines, partials, merges = s.capacity(rows, width, longest)
    assert len(work.lines) <= lines
    assert work.partials <= partials
    assert len(work.merges) <= merges


def test_skewed_batches_are_cut_evenly():
    """One long sequence among short ones: no piece takes much longer than the average program has to."""
    s = shape(programs=64)
    work = schedule(s, ints(*[1] * 32), ints(100_000, *[200] * 31))
    sizes = [min(end, 100_000) - begin for _, _, begin, end, _ in work.lines.tolist()]
    assert max(sizes) <= (100_000 + 31 * 200) // 64 + s.block_n
    assert sizes == sorted(sizes, reverse=True) or sizes[0] >= sizes[-1]


def test_full_steps_are_not_cut():
    work = schedule(shape(programs=64), ints(*[1] * 128), ints(*[4000] * 128))
    assert work.partials == 0
    assert len(work.lines) == 128


def test_fixed_pieces_depend_on_the_row_alone():
    s = shape(fixed=True, reach=300)
    alone = schedule(s, ints(1), ints(5000)).lines[:, 2:4].tolist()
    among = schedule(s, ints(1, 7, 1), ints(90, 6000, 5000))
    assert [line[2:4] for line in among.lines.tolist() if line[0] == 2] == alone


def test_each_token_of_sparse_attention_has_its_own_tiles():
    work = schedule(shape(group=20, topk=64, programs=1), ints(2, 1), ints(50, 9))
    assert sorted(line[:2] for line in work.lines.tolist()) == [[0, 0], [0, 16], [0, 20], [0, 36], [1, 0], [1, 16]]
    assert module.FEWEST_KEYS > 64  # so none of them is cut
