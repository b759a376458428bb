"""The group's rules in flex_attention's terms: a mask function, a score function, and the blocks worth visiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attn_core.backends.torch_native.tiles import Rules

BLOCK = 128
"""Queries and keys per block of a BlockMask."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(rules: Rules, shift: Tensor, start: Tensor) -> Callable[..., Tensor]:
    """Which of the keys ``start, start + 1, ...`` the queries see whose first sits ``shift`` after ``start``.

    Both are tensors ``(1,)``, read at batch index 0: so a compiled kernel takes them as inputs, not as constants.
    """

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ahead = j - i - shift[b]
        seen = ahead <= 0 if rules.causal else ahead == ahead
        if rules.window is not None:
            seen = seen & (ahead.abs() < rules.window)
        if rules.chunk is not None:
            seen = seen & ((i + shift[b] + start[b]) // rules.chunk == (j + start[b]) // rules.chunk)
        return seen

    return sees


def score_mod(softcap: Tensor | None, slopes: Tensor | None, shift: Tensor) -> ScoreMod | None:
    """Softcap ``(1,)``, then alibi by ``slopes`` ``(heads,)``. Tensors too: a float would be traced as a symbol, which
    inductor cannot lower here."""
    if softcap is None and slopes is None:
        return None

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap[b] * torch.tanh(score / softcap[b])
        if slopes is not None:
            score = score - slopes[h] * (i + shift[b] - j).abs()
        return score

    return change


def block_mask(
    rules: Rules, position: int, queries: int, start: int, end: int, sees: Callable[..., Any], device: torch.device
) -> BlockMask:
    """Blocks of keys ``start:end`` that the queries from ``position`` on may see, found from the rules alone.

    ``create_block_mask`` would evaluate the mask for every pair of query and key. Ranges of keys only move to the right
    from query to query, so a block of queries sees the range from its first query's first key to its last one's last,
    and all of it sees what both of them see.
    """
    ranges = []
    for row in range(0, queries, BLOCK):
        rim = row + BLOCK > queries  # a full block skips the mask, so none where queries end
        top, bottom = position + row, position + min(queries, row + BLOCK) - 1
        (first, first_end), (last, last_end) = rules.keys(top, end), rules.keys(bottom, end)
        lo, hi = max(first - start, 0) // BLOCK, -(-max(last_end - start, 0) // BLOCK)
        full_lo, full_hi = -(-max(last - start, 0) // BLOCK), max(first_end - start, 0) // BLOCK
        ranges.append((lo, max(lo, hi), *((lo, lo) if rim or full_lo >= full_hi else (full_lo, full_hi))))
    columns = -(-(end - start) // BLOCK)
    lo_t, hi_t, full_lo_t, full_hi_t = torch.tensor(ranges, dtype=torch.int32).T.unsqueeze(-1)
    at = torch.arange(columns, dtype=torch.int32)
    before, full = full_lo_t - lo_t, full_hi_t - full_lo_t
    partial = torch.where(at < before, lo_t + at, full_hi_t + at - before)
    parts = ((hi_t - lo_t - full).squeeze(-1), partial, full.squeeze(-1), full_lo_t + at)
    count, index, full_count, full_index = (t.clamp(0, columns)[None, None].to(device) for t in parts)
    made: BlockMask = BlockMask.from_kv_blocks(
        count, index.clamp(max=columns - 1), full_count, full_index.clamp(max=columns - 1),
        BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(queries, end - start),
    )  # fmt: skip
    return made
