"""What kernels over a flat list of pages need for one step, at fixed addresses where a graph was captured."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_core.runtime.batch import Batch
from attn_core.runtime.plan import Capture


class Indexed:
    """One role's rows of one step: sequence i owns ``indices[indptr[i]:indptr[i + 1]]`` (CSR). Needs exact lengths."""

    __slots__ = ("_kept", "capture", "cu_query", "indices", "indptr", "last_page_lens", "max_kv", "max_query",
                 "page_size", "rows")  # fmt: skip

    rows: int
    max_query: int
    max_kv: int
    """The longest, on the host; captured: the longest the graph serves."""
    cu_query: Tensor
    """Cumulative query lengths, int32 ``(rows + 1,)``, on the device, as all that follows."""
    indptr: Tensor
    """int32 ``(rows + 1,)``."""
    indices: Tensor
    """Page ids, int32; captured: room for as many as the graph serves."""
    last_page_lens: Tensor
    """Keys in each row's last page, int32 ``(rows,)``."""

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        self.page_size, self.capture = page_size, capture
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def fill(self, batch: Batch) -> None:
        csr = batch.csr(self.page_size)
        self.rows, self.max_query, self.max_kv = batch.num_seqs, batch.max_query_len, batch.max_kv_len
        self.cu_query, self.indptr = batch.cu_query_lens_device, csr.indptr_device
        self.indices, self.last_page_lens = csr.indices, csr.last_page_len_device
        if self.capture is not None:
            self._keep(self.capture)

    def _keep(self, capture: Capture) -> None:
        """The same in buffers that the graph knows."""
        self.max_kv = capture.max_kv_len
        if self._kept is None:
            room = capture.max_seqs * -(-capture.max_kv_len // self.page_size)
            self._kept = (
                torch.empty_like(self.cu_query), torch.empty_like(self.indptr), torch.empty_like(self.last_page_lens),
                self.indices.new_zeros(room),
            )  # fmt: skip
        for kept, new in zip(self._kept, (self.cu_query, self.indptr, self.last_page_lens, self.indices)):
            kept[: new.shape[0]].copy_(new)
        self.cu_query, self.indptr, self.last_page_lens, self.indices = self._kept
