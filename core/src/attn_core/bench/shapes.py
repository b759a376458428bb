"""The shapes that are measured: one attention problem each, with what it must move and compute at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attn_core.errors import BadInputError
from attn_core.spec import AttentionSpec, check

KINDS = ("decode", "skewed", "prefill", "mixed", "encode", "mla_decode", "mla_prefill")


@dataclass(frozen=True)
class Grid:
    """What a size means: models, and lengths as (sequences, tokens of each)."""

    gqa: Mapping[str, Any]
    encoder: Mapping[str, Any]
    mla: Mapping[str, Any]
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int], ...]
    skewed: tuple[int, int, int]
    """Sequences, keys of the first, keys of all others."""


_GQA = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
_ENCODER = {"num_heads": 12, "head_dim": 64, "attn_type": "encoder_only"}
_MLA = {
    "kind": "mla", "num_heads": 16, "head_dim": 192, "nope_dim": 128, "rope_dim": 64, "v_head_dim": 128,
    "latent_dim": 512,
}  # fmt: skip
"""The widths of DeepSeek's attention (config.json: qk_nope_head_dim and its kin), the heads of one rank of eight."""

_GRIDS = {
    "smoke": Grid(
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
        {**_ENCODER, "num_heads": 2, "head_dim": 32},
        {**_MLA, "num_heads": 2, "nope_dim": 16, "rope_dim": 16, "head_dim": 32, "v_head_dim": 16, "latent_dim": 32},
        decode=((2, 40),), prefill=((2, 24),), skewed=(3, 60, 5),
    ),
    "small": Grid(
        _GQA, _ENCODER, _MLA, decode=((1, 1024), (8, 1024), (32, 1024), (8, 4096)), prefill=((1, 1024), (4, 512)),
        skewed=(8, 8192, 128),
    ),
    "large": Grid(
        _GQA, _ENCODER, _MLA, decode=((1, 8192), (16, 8192), (64, 8192), (256, 1024)),
        prefill=((1, 8192), (1, 16384), (16, 1024)), skewed=(64, 65536, 1024),
    ),
}  # fmt: skip
"""``smoke`` runs anywhere in seconds, ``small`` is for CPUs, ``large`` for accelerators."""
SIZES = tuple(_GRIDS)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One step: ``query_lens`` new tokens of sequences with ``kv_lens`` keys, decode rows first."""

    kind: str
    name: str
    spec: AttentionSpec
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @property
    def role(self) -> str:
        """The role that is timed; ``mixed`` times a whole ``forward`` with both and the writing of keys."""
        return {"prefill": "prefill", "mla_prefill": "prefill", "encode": "encode"}.get(self.kind, "decode")

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are seen; for causal attention the i-th of n new tokens sees ``kv - n + i + 1``."""
        if self.spec.attn_type == "encoder_only":
            return sum(n * m for n, m in zip(self.query_lens, self.kv_lens))
        return sum(n * (m - n) + n * (n + 1) // 2 for n, m in zip(self.query_lens, self.kv_lens))

    def flops(self, absorbed: bool) -> int:
        """Multiplications and additions of both matrix products; softmax is not counted, as is customary."""
        d, dv = self._widths(absorbed)
        return 2 * self.pairs * self.spec.num_heads * (d + dv)

    def moved(self, absorbed: bool, kv_bytes: int) -> int:
        """Bytes that must move at least: q in, output out, every key and value once."""
        d, dv = self._widths(absorbed)
        element = 4 if self.spec.dtype == "float32" else 2
        rows = sum(self.query_lens) * self.spec.num_heads * (d + dv) * element
        if absorbed:  # one row of latent and rotary part serves as key and value
            return rows + sum(self.kv_lens) * d * kv_bytes
        heads = self.spec.num_heads if self.spec.kind == "mla" else self.spec.num_kv_heads
        return rows + sum(self.kv_lens) * heads * (d + dv) * kv_bytes

    def _widths(self, absorbed: bool) -> tuple[int, int]:
        s = self.spec
        if absorbed:
            return (s.latent_dim or 0) + (s.rope_dim or 0), s.latent_dim or 0
        return s.head_dim, s.v_head_dim or s.head_dim


def grid(size: str, dtype: str) -> tuple[Shape, ...]:
    """Every shape of a size. Raises :class:`BadInputError` for an unknown one."""
    g = _GRIDS[check.choice("bench", "size", size, SIZES)]
    gqa, encoder, mla = (AttentionSpec(**fields, dtype=dtype) for fields in (g.gqa, g.encoder, g.mla))
    count, long, short = g.skewed
    first = g.prefill[0][1]
    return (
        *(_same("decode", gqa, b, 1, n) for b, n in g.decode),
        Shape(
            kind="skewed", name=f"skewed 1 x {long}, {count - 1} x {short}", spec=gqa,
            query_lens=(1,) * count, kv_lens=(long, *[short] * (count - 1)),
        ),
        *(_same("prefill", gqa, b, n, n) for b, n in g.prefill),
        Shape(
            kind="mixed", name=f"mixed {count} x 1 of {first}, 1 x {first}", spec=gqa,
            query_lens=(*[1] * count, first), kv_lens=(*[first] * count, first),
        ),
        *(_same("encode", encoder, 4 * b, n // 4, n // 4) for b, n in g.prefill[:1]),
        *(_same("mla_decode", mla, b, 1, n) for b, n in g.decode[:3]),
        *(_same("mla_prefill", mla, b, n, n) for b, n in g.prefill[:1]),
    )  # fmt: skip


def _same(kind: str, spec: AttentionSpec, batch: int, query: int, kv: int) -> Shape:
    return Shape(
        kind=kind, name=f"{kind} {batch} x {kv}", spec=spec, query_lens=(query,) * batch, kv_lens=(kv,) * batch
    )


def chosen(size: str, dtype: str, kinds: tuple[str, ...]) -> tuple[Shape, ...]:
    """The grid's shapes of these kinds, all when none is named. Raises :class:`BadInputError` for an unknown kind."""
    for kind in kinds:
        check.choice("bench", "shapes", kind, KINDS)
    found = tuple(s for s in grid(size, dtype) if not kinds or s.kind in kinds)
    if not found:
        raise BadInputError(f"bench: size {size!r} has no shape of kind {', '.join(kinds)}")
    return found
