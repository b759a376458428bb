"""What kernels over ragged keys in memory need for one step."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_core.runtime.batch import Batch


class Ragged:
    """One role's rows of one step, whose keys lie packed in memory. Refers to the batch's tensors."""

    __slots__ = ("blind", "cu_kv", "cu_query", "max_kv", "max_query")

    cu_query: Tensor
    """Cumulative query lengths, int32 ``(rows + 1,)``, on the device."""
    cu_kv: Tensor
    """Cumulative key lengths, likewise; equal neighbours where a row has no keys."""
    max_query: int
    max_kv: int
    blind: Tensor | None
    """Tokens of rows without keys, int64, on the device; None where every row has some."""

    def fill(self, batch: Batch) -> None:
        self.cu_query, self.cu_kv = batch.cu_query_lens_device, batch.cu_kv_lens_device
        self.max_query, self.max_kv = batch.max_query_len, batch.max_kv_len
        self.blind = blind_tokens(batch)

    def nothing_seen(self, out: Tensor, lse: Tensor) -> None:
        """Zeros and -inf where a row has no keys, whatever the kernel left there; ``lse`` ``(tokens, heads)``.

        Vendors do not say, or say different things: FlashAttention-2 leaves +inf, which would win every merge.
        """
        if self.blind is not None:
            out[self.blind] = 0
            lse[self.blind] = -torch.inf


def blind_tokens(batch: Batch) -> Tensor | None:
    """Tokens of rows without keys, int64, on the device; None where every row has some. Read from host lengths."""
    empty = batch.kv_lens == 0
    if not empty.any():
        return None
    tokens = torch.repeat_interleave(empty, batch.query_lens.long()).nonzero()[:, 0]
    return tokens.to(batch.device, non_blocking=True)
