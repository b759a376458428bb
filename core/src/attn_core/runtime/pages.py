"""Forms of a block table that some kernels want instead of it; made without a device synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CsrPages:
    """All sequences' pages in one list (FlashInfer, aiter): sequence i owns ``indices[indptr[i]:indptr[i + 1]]``."""

    indptr: Tensor
    """int32 ``(num_seqs + 1,)`` on the host."""
    indices: Tensor
    """int32 ``(indptr[-1],)`` page ids on the device."""
    last_page_len: Tensor
    """int32 ``(num_seqs,)`` on the host: keys in each sequence's last page, 1 to page_size (0 without keys)."""

    @cached_property
    def indptr_device(self) -> Tensor:
        return self.indptr.to(self.indices.device, non_blocking=True)

    @cached_property
    def last_page_len_device(self) -> Tensor:
        return self.last_page_len.to(self.indices.device, non_blocking=True)

    def rows(self, lo: int, hi: int) -> CsrPages:
        """The same for rows ``lo`` to ``hi`` (exclusive); a view where they come first."""
        begin, end = int(self.indptr[lo]), int(self.indptr[hi])
        indptr = self.indptr[lo : hi + 1]
        return CsrPages(
            indptr=indptr - begin if begin else indptr,
            indices=self.indices[begin:end],
            last_page_len=self.last_page_len[lo:hi],
        )


def ragged_positions(offsets: Tensor, counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For every element of a ragged list: its row, and its place in the row. int64 ``(total,)`` on the device.

    ``offsets`` ``(rows + 1,)`` and ``counts`` ``(rows,)`` lie on the device, ``total`` on the host, so nothing waits.
    """
    rows = torch.arange(counts.shape[0], device=counts.device)
    row = torch.repeat_interleave(rows, counts.long(), output_size=total)
    return row, torch.arange(total, device=counts.device) - offsets.long()[row]


def csr_pages(block_table: Tensor, indptr: Tensor, counts: Tensor, last_page_len: Tensor) -> CsrPages:
    """Flatten a block table ``(num_seqs, max_pages)`` by host page counts.

    Most of what a step costs adapters that read lists of pages, hence few operations. The places of the listed pages in
    the table rise by one within a row, and by what the row leaves unused at its end. int32: a table of 2**31 entries
    would be 8 GiB of page ids. ``repeat_interleave`` would start every thread of a CPU for four numbers.
    """
    columns, device, total = block_table.shape[1], block_table.device, indptr.tolist()[-1]
    steps = torch.ones(total + 1, dtype=torch.int32, device=device)  # the last one is never read
    steps[:1].zero_()
    unused = (columns - counts).to(device, non_blocking=True)
    steps.index_add_(0, indptr[1:].to(device, non_blocking=True), unused)
    places = steps.cumsum(0, dtype=torch.int32)[:-1]
    return CsrPages(indptr=indptr, indices=block_table.reshape(-1).index_select(0, places), last_page_len=last_page_len)


def key_slots(
    block_table: Tensor, offsets: Tensor, counts: Tensor, total: int, page_size: int, starts: Tensor | None = None
) -> Tensor:
    """Cache rows (``page * page_size + place in page``) of a ragged list of keys, int64 ``(total,)``.

    Row i holds keys ``starts[i]`` to ``starts[i] + counts[i]`` of its sequence; ``starts`` defaults to zeros.
    """
    row, position = ragged_positions(offsets, counts, total)
    if starts is not None:
        position = position + starts.long()[row]
    return block_table[row, position // page_size].long() * page_size + position % page_size
