"""One tile from q as given to the output as wanted: dtypes, widths, cache scales, masks; then joining, and sinks.

Chosen at bind, so that a plain group runs the bare kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_core.backends.torch_native.scores import Attend, fused, fused_checking_mask, written_out
from attn_core.backends.torch_native.setup import Setup
from attn_core.backends.torch_native.sources import KV
from attn_core.backends.torch_native.tiles import Tile

OL = tuple[Tensor, Tensor]
"""Output ``(A, B, rows, width)`` and log-sum-exp ``(A, B, rows)``."""
OneTile = Callable[[Tensor, KV, "Tensor | None", bool, Any], OL]
"""``(q, (k, v), mask, causal, kv_cache)``; q ``(A, B, rows, width)`` as Setup lays it out."""
MaskOf = Callable[[Tile, int, "Tensor | None"], "Tensor | None"]
"""``(tile, sequence, bias)``: what is added to the tile's scores."""


def one_tile(s: Setup, *, blind_rows: bool = False) -> OneTile:
    """The kernel with what adapts q and the output to it. ``blind_rows``: a mask may hide all keys of a row."""
    attend = _kernel(s, blind_rows or s.b.spec.bias)
    scale, dtype, width, more, unit = s.b.scale, s.dtype, s.b.v_head_dim, s.q_width - s.b.head_dim, s.unit
    by_head, v_scale = s.per_kv_head, attrgetter("k_scale_t" if s.absorbed else "v_scale_t")

    def as_given(q: Tensor, kv: KV, mask: Tensor | None, causal: bool, cache: Any) -> OL:
        return attend(q, kv[0], kv[1], mask, causal, scale)

    def adapted(q: Tensor, kv: KV, mask: Tensor | None, causal: bool, cache: Any) -> OL:
        o, lse = attend(pad(q.to(dtype), (0, more)), kv[0], kv[1], mask, causal, scale)
        return o[..., :width], lse

    def dequantised(q: Tensor, kv: KV, mask: Tensor | None, causal: bool, cache: Any) -> OL:
        scaled = q.to(dtype) * (cache.k_scale_t * unit).view(by_head)
        o, lse = attend(pad(scaled, (0, more)), kv[0], kv[1], mask, causal, scale)
        return o[..., :width] * (v_scale(cache) * unit).view(by_head), lse

    if s.quantised:
        return dequantised
    return as_given if dtype == s.b.dtype and s.q_width == s.b.head_dim == width else adapted


def _kernel(s: Setup, blind_rows: bool) -> Attend:
    if s.fused:
        return fused_checking_mask if blind_rows else fused
    written = written_out(s.b.spec.logit_softcap)
    if not s.packed:
        return written

    def heads_first(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        mask = None if mask is None else mask.transpose(0, 1)
        o, lse = written(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask, causal, scale)
        return o.transpose(0, 1), lse.transpose(0, 1)

    return heads_first


def with_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> OL:
    """A sink is one more logit whose value is zero: it takes sigmoid(sink - lse) of the row's weight.

    ``sinks`` broadcasts to ``lse``, ``o`` has one axis more. Rows without keys stay as they are.
    """
    o = o * torch.sigmoid(lse - sinks).unsqueeze(-1)
    return o, torch.where(lse == float("-inf"), lse, torch.logaddexp(lse, sinks))


def joined(o: Tensor, lse: Tensor, dim: int, *, blind: bool, lse_wanted: bool) -> OL:
    """Attention over disjoint keys as one, in float32: the pieces lie along ``dim`` of both, ``o`` has the width last.

    ``blind``: some rows may see nothing at all. Without ``lse_wanted`` the second result means nothing.
    """
    weights = torch.softmax(lse, dim).unsqueeze(-1)
    if blind:
        weights = weights.nan_to_num_(0.0)
    return (o * weights).sum(dim), torch.logsumexp(lse, dim) if lse_wanted else lse


def mask_of(s: Setup) -> MaskOf:
    """The tile's own mask, plus alibi and bias where the group has them."""

    def plain(t: Tile, row: int, bias: Tensor | None) -> Tensor | None:
        return t.mask

    extra: list[MaskOf] = []
    if s.slopes is not None:
        extra.append(_alibi(s, s.slopes))
    if s.b.spec.bias:
        extra.append(_bias(s))
    if not extra:
        return plain

    def summed(t: Tile, row: int, bias: Tensor | None) -> Tensor | None:
        total = t.mask
        for make in extra:
            part = make(t, row, bias)
            if part is not None:
                total = part if total is None else total + part
        return total

    return summed


def _alibi(s: Setup, slopes: Tensor) -> MaskOf:
    by_head = slopes.view(*s.axes, 1, s.packed_heads)

    def alibi(t: Tile, row: int, bias: Tensor | None) -> Tensor | None:
        if t.distance is None:
            return None
        n = t.q1 - t.q0
        return by_head.expand(-1, -1, n, -1).reshape(*s.axes, n * s.packed_heads, 1) * t.distance

    return alibi


def _bias(s: Setup) -> MaskOf:
    """From ``(sequences or 1, heads or 1, queries, keys)``."""

    def part_of_bias(t: Tile, row: int, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        part = bias[row if bias.shape[0] > 1 else 0, :, t.q0 : t.q1, t.k0 : t.k1].float()
        n, keys, r = t.q1 - t.q0, t.k1 - t.k0, s.packed_heads
        if part.shape[0] == 1:
            return part.repeat_interleave(r, 1).unsqueeze(0)
        return part.view(*s.axes, r, n, keys).transpose(2, 3).reshape(*s.axes, n * r, keys)

    return part_of_bias
