"""The keys and values that transformers hands over, as a paged cache, without a copy where strides allow it.

transformers keeps a tensor per layer, ``(batch, kv heads, keys, width)``, and sequences start anywhere in it (padding).
Read with strides, page p of such a tensor holds the tokens ``p, p + 1, ...`` of the flattened ``(batch, keys)`` and so
overlaps the next page; a block table then starts at any token it likes. With pages of one token every token has its
page. A longer page may reach past the end of the tensor: then there must be a copy with room for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.integrations.hf_mask import Rows
from attn_core.runtime import BoundGroup, KVCache


@dataclass(frozen=True)
class Paging:
    """How one shape of k and v is paged. Layers of one forward share it as long as their strides agree."""

    apart: int
    """Pages between the first tokens of two sequences."""
    copies: bool


class KeyPages:
    """Pages for one bound group: its page size, layout and kernel widths. Raises :class:`AttnCoreError` for caches that
    are not transformers' own with other strides."""

    def __init__(self, group: BoundGroup) -> None:
        kernel = group.bindings["decode"]
        if group.kv_layout not in ("NHD", "HND") or group.page_size is None:
            raise AttnCoreError(
                f"group {group.name!r} was decided for caches of layout {group.kv_layout!r}, and transformers keeps "
                "its own; attach with kv_layout='NHD'"
            )
        if group.kv_dtype != kernel.dtype:
            raise AttnCoreError(
                f"group {group.name!r} was decided for a cache of {group.kv_dtype}, and transformers keeps "
                f"{kernel.dtype}; attach without kv_cache_dtype"
            )
        self.page, self.layout = group.page_size, group.kv_layout
        self.widths = (kernel.head_dim, kernel.v_head_dim)
        self.scale = torch.ones((), device=group.torch_device)

    def paging(self, k: Tensor, v: Tensor, rows: Rows) -> Paging:
        """For tensors of these shapes and strides."""
        _, heads, keys, _ = k.shape
        apart = _apart(k)
        copies = apart is None or apart != _apart(v) or (k.shape[-1], v.shape[-1]) != self.widths
        if not copies and self.page > 1:
            ends = (a + -(-n // self.page) * self.page for a, n in zip(rows.first_key, rows.kv_lens))
            copies = max(ends, default=0) > keys
        if copies or apart is None:
            return Paging(heads * (keys + self.page - 1), True)
        return Paging(apart, False)

    def table(self, paging: Paging, rows: Rows) -> Tensor:
        """The block table of the sequences in ``rows``, int32, on the host."""
        starts = [s * paging.apart + a for s, a in zip(rows.sequences, rows.first_key)]
        columns = torch.arange(0, max(rows.kv_lens), self.page, dtype=torch.int32)
        return torch.tensor(starts, dtype=torch.int32)[:, None] + columns

    def wrap(self, k: Tensor, v: Tensor, paging: Paging) -> KVCache:
        """One layer's k and v ``(batch, kv heads, keys, width)``."""
        if paging.copies:
            k, v = (_copy(x, self.page - 1, width) for x, width in zip((k, v), self.widths))
        return KVCache(
            data=(self._pages(k, paging.apart), self._pages(v, paging.apart)),
            layout=self.layout,
            page_size=self.page,
            k_scale_t=self.scale,
            v_scale_t=self.scale,
        )

    def _pages(self, x: Tensor, apart: int) -> Tensor:
        batch, heads, keys, width = x.shape
        by_head, by_key = x.stride(1), x.stride(2)
        count = (batch - 1) * apart + keys - self.page + 1
        if self.layout == "NHD":
            shape, stride = (count, self.page, heads, width), (by_key, by_key, by_head, 1)
        else:
            shape, stride = (count, heads, self.page, width), (by_key, by_head, by_key, 1)
        return x.as_strided(shape, stride, x.storage_offset())


def _copy(x: Tensor, more: int, width: int) -> Tensor:
    """``x`` with room for ``more`` tokens, ``width`` columns wide. Made by hand for its strides: ``contiguous`` leaves
    any stride to an axis of one element."""
    batch, heads, keys, columns = x.shape
    room = x.new_zeros(batch, heads, keys + more, width)
    room[:, :, :keys, :columns] = x
    return room


def _apart(x: Tensor) -> int | None:
    """Tokens between the starts of two sequences, in steps from token to token; None where that is no number."""
    by_sequence, _, by_key, by_column = x.stride()
    if by_column != 1 or by_key == 0:
        return None
    if x.shape[0] == 1:
        return 0
    return None if by_sequence % by_key else by_sequence // by_key
