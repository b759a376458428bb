"""Query and key lengths of one step, and all that derives from them alone; shared by every view of a batch."""

from __future__ import annotations

from array import array
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from attn_core.errors import BadInputError

_INT32_MAX = 2**31 - 1
FEW = 128
"""Up to so many sequences Python's integers are faster than tensors: an operation costs as much as ten of theirs."""


class Lengths:
    """Host lengths, int32 ``(num_seqs,)``, with their derived forms, each made once on first reading.

    A view of some rows slices what its parent has, so that several kernels cost one transfer to the device.
    """

    def __init__(
        self,
        query: Tensor,
        kv: Tensor,
        device: torch.device,
        *,
        kv_device: Tensor | None = None,
        exact: bool = True,
        within: tuple[Lengths, int, int] | None = None,
    ) -> None:
        self.query = query
        self.kv = kv
        self.device = device
        self.exact = exact
        self._kv_device = kv_device
        self._within = within
        self.queries: list[int] = query.tolist()
        self.keys: list[int] = query.tolist() if kv is query else kv.tolist()
        self._page_counts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def rows(self, lo: int, hi: int) -> Lengths:
        """Rows ``lo`` to ``hi`` (exclusive) as a view."""
        kv_device = None if self._kv_device is None else self._kv_device[lo:hi]
        return Lengths(
            self.query[lo:hi], self.kv[lo:hi], self.device, kv_device=kv_device, exact=self.exact, within=(self, lo, hi)
        )

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.queries)

    @cached_property
    def max_query(self) -> int:
        return max(self.queries)

    @cached_property
    def max_kv(self) -> int:
        return max(self.keys)

    @cached_property
    def query_on_device(self) -> Tensor:
        if self._within is not None:
            whole, lo, hi = self._within
            return whole.query_on_device[lo:hi]
        return self.query.to(self.device, non_blocking=True)

    @cached_property
    def kv_on_device(self) -> Tensor:
        if self._kv_device is not None:
            return self._kv_device
        if self._within is not None:
            whole, lo, hi = self._within
            return whole.kv_on_device[lo:hi]
        return self.kv.to(self.device, non_blocking=True)

    @cached_property
    def cu_query(self) -> Tensor:
        if self._within is not None:
            return self._cut("cu_query")
        rows, width = len(self.queries), self.max_query
        if self.num_tokens == rows * width:  # all alike, as decode rows are: cheaper than to add them up
            return torch.arange(0, (rows + 1) * width, width, dtype=torch.int32)
        return cumulative(self.query)

    @cached_property
    def cu_query_on_device(self) -> Tensor:
        if self._within is not None:
            return self._cut("cu_query_on_device")
        return self.cu_query.to(self.device, non_blocking=True)

    @cached_property
    def cu_kv(self) -> Tensor:
        if self._within is not None:
            return self._cut("cu_kv")
        if sum(self.keys) > _INT32_MAX:
            raise BadInputError(
                f"Batch: kv_lens sum to {sum(self.keys)} keys, more than int32 offsets can count; split the step"
            )
        return cumulative(self.kv)

    @cached_property
    def cu_kv_on_device(self) -> Tensor:
        if self._within is not None:
            return self._cut("cu_kv_on_device")
        if self._kv_device is not None:
            return cumulative(self._kv_device)
        return self.cu_kv.to(self.device, non_blocking=True)

    def _cut(self, name: str) -> Tensor:
        """The parent's cumulative form for these rows: a view when they come first."""
        if self._within is None:
            raise AttributeError(name)
        whole, lo, hi = self._within
        offsets: Tensor = getattr(whole, name)[lo : hi + 1]
        return offsets - offsets[0] if lo else offsets

    def pages(self, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cumulative page counts ``(num_seqs + 1,)``, the counts, and keys in each last page; host int32."""
        if page_size not in self._page_counts:
            make = self._pages_of_few if len(self.keys) <= FEW else self._pages_of_many
            self._page_counts[page_size] = make(page_size)
        return self._page_counts[page_size]

    def _pages_of_few(self, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
        counts = [-(-keys // page_size) for keys in self.keys]
        last = [keys - (pages - 1) * page_size if keys else 0 for keys, pages in zip(self.keys, counts)]
        made = torch.frombuffer(array("i", [*accumulate(counts, initial=0), *counts, *last]), dtype=torch.int32)
        offsets, sizes, ends = made.split_with_sizes((len(counts) + 1, len(counts), len(counts)))
        return offsets, sizes, ends

    def _pages_of_many(self, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
        if page_size == 1:
            return self.cu_kv, self.kv, self.kv.clamp(max=1)
        before = (self.kv - 1).floor_divide_(page_size)  # pages before the last; -1 where there is none
        last = torch.minimum(torch.sub(self.kv, before, alpha=page_size), self.kv)
        counts = before.add_(1)
        return cumulative(counts), counts, last


def cumulative(lengths: Tensor) -> Tensor:
    """``[0, a, a + b, ...]`` in int32, on the device of ``lengths``."""
    out = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=out[1:])
    return out
