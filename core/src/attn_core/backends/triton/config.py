"""Tile sizes, warps and loads in flight: rules by family of architectures and shape, checked against its limits.

Nothing is measured, at import or later. A shape takes the first tile of its list that fits: shared memory for the keys
in flight beside q and p, and registers for accumulators and scores. An architecture that no family names gets the
limits of the most modest family of its platform, with its own shared memory where the device states it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from attn_core.backends.triton.widths import LEAST, Parts, parts, power_of_two
from attn_core.errors import AttnCoreError

KIB = 1024


@dataclass(frozen=True)
class Tile:
    """How one kernel is compiled."""

    block_m: int
    block_n: int
    warps: int
    buffers: int = 2
    """Blocks of k and v in shared memory at once: one is computed with, the others are on their way."""

    def stages(self, paged: bool) -> int:
        """Triton's ``num_stages`` for as many buffers. Its pipeliner spreads the stages over the chain of loads, and
        pages are a chain of two, page table and keys: each link gets every second stage."""
        return 2 * self.buffers + 1 if paged else self.buffers + 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures that want the same tiles."""

    archs: frozenset[str]
    shared: int
    """Bytes of shared memory a block may have."""
    lanes: int
    """Threads per warp."""
    registers: int
    """Of a thread, for what :func:`registers` counts; the rest of its file holds addresses and what is in between."""
    registers_of_eight: int = 0
    """The same where eight warps share the file; 0: as many."""
    holds_q: bool = False
    """q stays in registers, whole in every warp; elsewhere it is read from shared memory piece by piece."""
    spare: int = 0
    """Blocks of keys that the compiler may hold beyond those asked for."""
    warp_groups: bool = False
    """Products of 64 rows are the work of four warps together (wgmma, tcgen05)."""
    prefill: tuple[Tile, ...]
    """Best first."""
    halves: Tile | None = None
    """The tile of MLA whose latent is wider than 256 and comes in two halves; None: it comes as one."""
    keys: int
    """block_n of decode, where it fits."""
    buffers: int = 2
    programs: int = 2
    """Decode programs per multiprocessor: they hide each other's latencies, and share its memory if they can."""
    units: int
    """Multiprocessors where the runtime does not say."""


SMALLEST = Tile(LEAST, LEAST, 8, 1)
_SMALL = (Tile(64, 32, 8), Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 4), Tile(16, 16, 8))
_LARGE = (Tile(128, 64, 8), Tile(64, 64, 8), *_SMALL)
_SINGLE = tuple(replace(t, buffers=1) for t in _LARGE)
_MODEST = tuple(replace(t, buffers=1) for t in _SMALL)
_NVIDIA = 120
_FMA = 35
"""Registers where products are not the work of matrix instructions: Turing (Triton has none for it), and float32."""

FAMILIES: dict[str, tuple[Family, ...]] = {
    "cuda": (
        Family(
            archs=frozenset({"sm_75"}), shared=64 * KIB, lanes=32, registers=_FMA, prefill=_MODEST, keys=32, buffers=1,
            halves=SMALLEST, units=40,
        ),
        Family(
            archs=frozenset({"sm_86", "sm_89", "sm_120", "sm_121"}), shared=99 * KIB, lanes=32, registers=_NVIDIA,
            prefill=(*_LARGE, *_SINGLE), keys=64, units=64,
        ),
        Family(
            archs=frozenset({"sm_80"}), shared=163 * KIB, lanes=32, registers=_NVIDIA, prefill=(*_LARGE, *_SINGLE),
            keys=64, units=108,
        ),
        Family(
            archs=frozenset({"sm_90", "sm_100", "sm_103", "sm_110"}), shared=227 * KIB, lanes=32, registers=_NVIDIA,
            warp_groups=True, prefill=(*_LARGE, *_SINGLE), keys=64, units=132,
        ),
    ),
    "rocm": (
        Family(
            archs=frozenset({"gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151"}), shared=64 * KIB, lanes=32,
            registers=60, holds_q=True, prefill=_MODEST, keys=32, buffers=1, units=48,
        ),
        Family(
            archs=frozenset({"gfx1200", "gfx1201"}), shared=64 * KIB, lanes=32, registers=100, holds_q=True,
            prefill=_SINGLE, keys=64, buffers=1, units=32,
        ),
        Family(
            archs=frozenset({"gfx90a", "gfx942"}), shared=64 * KIB, lanes=64, registers=150, holds_q=True,
            prefill=_SINGLE, keys=64, buffers=1, units=304,
        ),
        Family(
            archs=frozenset({"gfx950"}), shared=160 * KIB, lanes=64, registers=150, registers_of_eight=112,
            holds_q=True, spare=1, prefill=_SINGLE, keys=64, buffers=1, units=256,
        ),
        Family(
            archs=frozenset({"gfx1250"}), shared=160 * KIB, lanes=32, registers=230, holds_q=True, spare=1,
            prefill=_SINGLE, keys=64, buffers=1, units=256,
        ),
    ),
    "xpu": (
        Family(
            archs=frozenset(), shared=64 * KIB, lanes=16, registers=150, holds_q=True, prefill=_SINGLE, keys=64,
            buffers=1, units=64,
        ),
    ),
}  # fmt: skip
"""By platform, the most modest first."""


def family(platform: str, arch: str, shared: int | None = None) -> Family:
    """The family of an architecture; the most modest of the platform for one that none names."""
    for found in FAMILIES[platform]:
        if arch in found.archs:
            return found
    modest = FAMILIES[platform][0]
    return modest if shared is None else replace(modest, shared=shared)


def tile(found: Family, q: Parts, v: Parts, *, joined: bool, itemsize: int, stored: int, rows: int | None) -> Tile:
    """The tile for a shape. ``joined``: v is part of k. ``itemsize`` and ``stored``: bytes of an element of q and of
    the keys in memory. ``rows``: of a decode tile, query heads of a kv head times query tokens; None for prefill.

    Raises :class:`AttnCoreError` where not even the smallest tile fits.
    """
    fits: Any = {"joined": joined, "itemsize": itemsize, "stored": stored}
    if (
        (one := found.halves)
        and in_halves(found, v, joined=joined)
        and shared(one, q, v, found, **fits) <= found.shared
    ):
        return one
    for chosen, share in ((t, 1) for t in found.prefill) if rows is None else _decode(found, v, rows):
        limit = found.registers_of_eight if chosen.warps == 8 and found.registers_of_eight else found.registers
        limit = limit if itemsize == 2 else min(_FMA, limit)
        needs = shared(chosen, q, v, found, **fits)
        if needs * share <= found.shared and registers(chosen, q, v, found, itemsize) <= limit:
            return chosen
    if shared(SMALLEST, q, v, found, **fits) <= found.shared and itemsize == 4:
        return SMALLEST  # float32 is for checking: it may spill
    raise AttnCoreError(
        f"triton: no tile for head_dim={q.width}, v_head_dim={v.width} in {found.shared} bytes of shared memory and "
        f"{found.registers} registers a thread; choose another backend for this shape"
    )


def in_halves(found: Family, v: Parts, *, joined: bool) -> bool:
    """Whether keys come in two halves."""
    return joined and found.halves is not None and v.columns > 256


def _decode(found: Family, v: Parts, rows: int) -> Iterator[tuple[Tile, int]]:
    """As many rows as there are, so that keys are read once; then as many keys as fit. With the programs that must fit
    together: all that hide each other's latencies if possible, else one."""
    heights = [m for m in (64, 32, LEAST) if m <= max(LEAST, power_of_two(rows))]
    keys = found.keys if v.columns <= 256 else 32
    for lengths in ((keys, 32), (LEAST,)):
        for share, buffers in ((found.programs, found.buffers), (1, found.buffers), (1, 1)):
            for block_m, block_n, warps in product(heights, lengths, (4, 8)):
                yield Tile(block_m, block_n, warps, buffers), share


def shared(t: Tile, q: Parts, v: Parts, found: Family, *, joined: bool, itemsize: int, stored: int) -> int:
    """Bytes of shared memory, at most: blocks of k and v, q, p on its way from one product to the next, and the
    accumulators where warp groups share rows. Tests hold it against what the compiler says."""
    if in_halves(found, v, joined=joined):  # multiply-adds: q, and one half of the keys at a time, in float32
        return 4 * (t.block_m * q.columns + t.block_n * v.columns // 2)
    row = q.columns + (0 if joined else v.columns)
    turned = t.block_m * v.columns * 4 if found.warp_groups and t.block_m >= 64 else 0
    return (
        (t.buffers + found.spare) * t.block_n * row * stored
        + t.block_m * (q.columns + t.block_n + 8) * itemsize
        + turned
    )


def registers(t: Tile, q: Parts, v: Parts, found: Family, itemsize: int) -> int:
    """Registers of 4 bytes a thread needs for accumulators, scores, a block of v, and q where the family holds it."""
    threads = t.warps * found.lanes
    halves = t.block_n * v.columns // threads
    if found.holds_q:  # warps share the rows of a tile only as far as each has 16
        halves += max(LEAST, t.block_m // t.warps) * q.columns // found.lanes
    return t.block_m * (v.columns + t.block_n) // threads + halves * itemsize // 4


def widest(found: Family, itemsize: int) -> int:
    """Largest head_dim (and v_head_dim) that the family has tiles for."""
    return max(w for w in (64, 128, 192, 256, 384, 512) if _serves(found, w, w, itemsize, joined=False))


def serves_latent(found: Family, itemsize: int) -> bool:
    """Whether absorbed MLA fits: q and k of 576 columns, v of 512 within k."""
    return _serves(found, 576, 512, itemsize, joined=True)


def _serves(found: Family, d: int, dv: int, itemsize: int, *, joined: bool) -> bool:
    try:
        for rows in (None, LEAST):
            tile(found, parts(d), parts(dv), joined=joined, itemsize=itemsize, stored=itemsize, rows=rows)
    except AttnCoreError:
        return False
    return True
