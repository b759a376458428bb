"""One tile from q as given to the output as wanted: dtype, widths, cache scales; and what joins tiles: sinks, merging.

Chosen at bind, so that a plain group runs the bare kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_core.backends.torch_native.scores import TINY, fused, fused_checking_mask, written_out
from attn_core.backends.torch_native.setup import Setup
from attn_core.backends.torch_native.sources import KV
from attn_core.backends.torch_native.tiles import Tile

OL = tuple[Tensor, Tensor]
"""Output ``(A, B, rows, width)`` and log-sum-exp ``(A, B, rows)``."""
OneTile = Callable[[Tensor, KV, "Tensor | None", bool, Any], OL]
"""``(q, (k, v), mask, causal, kv_cache)``, tensors ``(A, B, rows or keys, width)``."""
Finish = Callable[[Tensor, Tensor, Any], OL]
"""``(output, lse, sinks)``, once per row of queries."""
MaskOf = Callable[[Tile, int, "Tensor | None"], "Tensor | None"]
"""``(tile, sequence, bias)``: what is added to the tile's scores."""


def one_tile(s: Setup) -> OneTile:
    """The kernel with whatever adapts q and the output to it."""
    attend = (fused_checking_mask if s.b.spec.bias else fused) if s.fused else written_out(s.b.spec.logit_softcap)
    scale, dtype, width, more, unit = s.b.scale, s.dtype, s.b.v_head_dim, s.q_width - s.b.head_dim, s.unit
    v_scale = attrgetter("k_scale_t" if s.absorbed else "v_scale_t")

    def as_given(q: Tensor, kv: KV, mask: Tensor | None, causal: bool, cache: Any) -> OL:
        return attend(q, kv[0], kv[1], mask, causal, scale)

    def adapted(q: Tensor, kv: KV, mask: Tensor | None, causal: bool, cache: Any) -> OL:
        o, lse = attend(pad(q.to(dtype), (0, more)), kv[0], kv[1], mask, causal, scale)
        return o[..., :width], lse

    def dequantised(q: Tensor, kv: KV, mask: Tensor | None, causal: bool, cache: Any) -> OL:
        scaled = q.to(dtype) * (cache.k_scale_t * unit).view(-1, 1, 1, 1)
        o, lse = attend(pad(scaled, (0, more)), kv[0], kv[1], mask, causal, scale)
        return o[..., :width] * (v_scale(cache) * unit).view(-1, 1, 1, 1), lse

    if s.quantised:
        return dequantised
    return as_given if dtype == s.b.dtype and s.q_width == s.b.head_dim == width else adapted


def finish(s: Setup) -> Finish:
    """Sinks: one more logit whose value is zero takes sigmoid(sink - lse) of every row's weight."""
    a, lanes, r = s.heads_kv, s.lanes, s.packed_heads

    def nothing(o: Tensor, lse: Tensor, sinks: Any) -> OL:
        return o, lse

    def with_sinks(o: Tensor, lse: Tensor, sinks: Tensor | None) -> OL:
        if sinks is None:
            return o, lse
        by_head, rows = sinks.view(a, lanes, 1, r), lse.view(a, lanes, -1, r)
        kept = torch.sigmoid(rows - by_head)
        o = (o.view(a, lanes, -1, r, o.shape[-1]) * kept.unsqueeze(-1)).view(o.shape)
        return o, torch.where(rows == float("-inf"), rows, torch.logaddexp(rows, by_head)).view(lse.shape)

    return with_sinks if s.b.spec.sinks else nothing


def merged(parts: list[OL]) -> OL:
    """Attention of the same queries over disjoint stretches of keys, joined in float32."""
    sums = torch.stack([lse for _, lse in parts])
    top = sums.amax(0)
    weights = torch.exp(sums - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(0)
    o = (torch.stack([o for o, _ in parts]) * weights.unsqueeze(-1)).sum(0)
    return o / total.clamp_min(TINY).unsqueeze(-1), top + total.log()


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
    by_head = slopes.view(s.heads_kv, s.lanes, 1, s.packed_heads)

    def alibi(t: Tile, row: int, bias: Tensor | None) -> Tensor | None:
        if t.distance is None:
            return None
        n = t.q1 - t.q0
        return by_head.expand(-1, -1, n, -1).reshape(s.heads_kv, s.lanes, n * s.packed_heads, 1) * t.distance

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
        grouped = part.view(s.heads_kv, s.lanes, r, n, keys).transpose(2, 3)
        return grouped.reshape(s.heads_kv, s.lanes, n * r, keys)

    return part_of_bias
