"""What kernels over a block table need for one step, at fixed addresses where a graph was captured."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_core.runtime.batch import Batch
from attn_core.runtime.plan import Capture


class Paged:
    """One role's rows of one step. Refilled in place; without a capture it only refers to the batch's tensors."""

    __slots__ = ("_kept", "capture", "cu_query", "kv_lens", "max_kv", "max_query", "page_size", "rows", "table")

    rows: int
    max_query: int
    max_kv: int
    """The longest, on the host; captured: the longest the graph serves."""
    cu_query: Tensor
    """Cumulative query lengths, int32 ``(rows + 1,)``."""
    kv_lens: Tensor
    """int32 ``(rows,)``, on the device."""
    table: Tensor
    """int32 ``(rows, max pages)``, on the device."""

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        self.page_size, self.capture = page_size, capture
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def fill(self, batch: Batch) -> None:
        table = _table(batch)
        self.rows, self.max_query, self.max_kv = batch.num_seqs, batch.max_query_len, batch.max_kv_len
        self.cu_query, self.kv_lens, self.table = batch.cu_query_lens_device, batch.kv_lens_device, table
        if self.capture is not None:
            self._keep(self.capture)

    def _keep(self, capture: Capture) -> None:
        """The same in buffers that the graph knows."""
        self.max_kv = capture.max_kv_len
        if self._kept is None:
            pages = -(-capture.max_kv_len // self.page_size)
            self._kept = (
                torch.empty_like(self.cu_query), torch.empty_like(self.kv_lens),
                self.table.new_zeros(self.rows, pages),
            )  # fmt: skip
        cu_query, kv_lens, table = self._kept
        width = min(table.shape[1], self.table.shape[1])
        cu_query.copy_(self.cu_query)
        kv_lens.copy_(self.kv_lens)
        table[:, :width].copy_(self.table[:, :width])
        self.cu_query, self.kv_lens, self.table = self._kept


def _table(batch: Batch) -> Tensor:
    if batch.block_table is None:
        raise ValueError("a kernel over pages was planned with a batch that has no block_table")
    return batch.block_table
