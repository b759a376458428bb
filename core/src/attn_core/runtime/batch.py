"""One step as one group of layers sees it: lengths on the host, pages on the device, derived forms made once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from attn_core.errors import BadInputError
from attn_core.runtime import checks
from attn_core.runtime.lengths import Lengths
from attn_core.runtime.pages import CsrPages, csr_pages, key_slots
from attn_core.spec import check

ATTN_TYPES = ("decoder", "encoder_only", "cross")


class Batch:
    """The sequences of one step. Immutable: tensors are held, not copied, so leave them alone until the step is over.

    ``query_lens``, ``kv_lens``
        int32 ``(num_seqs,)`` on the host, or lists. ``kv_lens`` counts the keys visible to the last query, new tokens
        included; for ``cross`` it is the encoder length and may be smaller than ``query_lens``; ``encoder_only``
        defaults it to ``query_lens``.
    ``block_table``
        int32 ``(num_seqs, max_pages)`` on the device; page 0 is the null page. None for ``encoder_only``.
    ``slot_mapping``
        int64 ``(num_new_keys,)`` on the device: the cache row (page * page_size + place) of each new key, -1 = do not
        write. None: nothing is written, all keys are in the cache already.
    ``kv_lens_device``, ``exact``
        With ``exact=False`` the host's ``kv_lens`` are upper bounds and ``kv_lens_device`` (int32) is authoritative.
    ``decode_width``
        Query length of a decode row: 1, or the verify width. Decode rows come first, see :meth:`order`. A row of that
        width with kv length 1 whose page is page 0 is padding.
    ``num_decode_rows``
        How many leading rows are decode rows. None: all rows of that width, and one that comes later is an error. An
        engine that says it may have later rows of that width; they prefill (the last chunk of a prompt).
    ``tree_mask``
        bool ``(num_decode_rows, decode_width, decode_width)``: which of its row's new tokens each new token sees.
        Replaces causality among them; older keys stay visible.
    ``bidirectional_spans``
        Per sequence the ``(start, end)`` key positions, end exclusive, that see each other in both directions:
        visible = (causal & window & chunk) | same span.
    ``device``
        Where derived forms go; taken from the tensors when there are any, else CPU.
    ``page_size``, ``num_pages``
        Optional: check the pages now instead of in ``plan``. Ids that lie on an accelerator are read only when
        ``num_pages`` is given here, because reading waits for the device.

    Raises :class:`BadInputError` for anything that contradicts this. A batch that exists is valid.
    """

    lengths: Lengths
    attn_type: str
    decode_width: int
    block_table: Tensor | None
    slot_mapping: Tensor | None
    tree_mask: Tensor | None
    bidirectional_spans: checks.Spans | None
    num_decode_rows: int
    """Leading rows whose query length is ``decode_width``; 0 for ``encoder_only``."""
    _within: tuple[Batch, int, int] | None
    """The batch that these rows are a part of, whose derived forms are sliced."""

    def __init__(
        self,
        query_lens: Tensor | Sequence[int],
        kv_lens: Tensor | Sequence[int] | None = None,
        *,
        block_table: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        kv_lens_device: Tensor | None = None,
        exact: bool = True,
        decode_width: int = 1,
        num_decode_rows: int | None = None,
        tree_mask: Tensor | None = None,
        bidirectional_spans: Sequence[Iterable[tuple[int, int]]] | None = None,
        attn_type: str = "decoder",
        device: torch.device | str | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        check.choice("Batch", "attn_type", attn_type, ATTN_TYPES)
        check.size("Batch", "decode_width", decode_width)
        query = checks.host_lengths("query_lens", query_lens)
        if kv_lens is None and attn_type != "encoder_only":
            raise BadInputError(f"Batch: attn_type={attn_type!r} needs kv_lens; only encoder_only can do without")
        kv = query if kv_lens is None else checks.host_lengths("kv_lens", kv_lens)
        where = checks.one_device(
            device,
            {
                "block_table": block_table,
                "slot_mapping": slot_mapping,
                "kv_lens_device": kv_lens_device,
                "tree_mask": tree_mask,
            },
        )
        if not exact and kv_lens_device is None:
            raise BadInputError("Batch: exact=False needs kv_lens_device, the int32 tensor that holds the true lengths")
        lengths = Lengths(query, kv, where, kv_device=kv_lens_device, exact=exact)
        checks.lengths(lengths.queries, lengths.keys, attn_type, decode_width)
        checks.tensor("kv_lens_device", kv_lens_device, torch.int32, (query.shape[0],), "(num_seqs,)")
        rows = 0
        if attn_type != "encoder_only":
            rows = checks.decode_rows_first(lengths.queries, decode_width, num_decode_rows)
        checks.tree_mask(tree_mask, rows, decode_width)
        self.__dict__.update(
            lengths=lengths,
            attn_type=attn_type,
            decode_width=decode_width,
            tree_mask=tree_mask,
            bidirectional_spans=checks.spans(bidirectional_spans, lengths.keys),
            num_decode_rows=rows,
            _within=None,
        )
        self._take_pages(block_table, slot_mapping, page_size, num_pages)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a Batch is immutable; build another one, or use with_pages() to change {name}")

    def _take_pages(
        self, block_table: Tensor | None, slot_mapping: Tensor | None, page_size: int | None, num_pages: int | None
    ) -> None:
        checks.tensor("block_table", block_table, torch.int32, (self.num_seqs, None), "(num_seqs, max_pages)")
        checks.slots(slot_mapping, self.attn_type, self.num_tokens, sum(self.lengths.keys))
        self.__dict__.update(block_table=block_table, slot_mapping=slot_mapping)
        if page_size is not None:
            self.check_pages(page_size, num_pages)

    def _like(self, **changes: Any) -> Batch:
        """A view: this batch with other attributes, none of them checked again and no derived form kept."""
        view = object.__new__(Batch)
        view.__dict__.update({name: self.__dict__[name] for name in Batch.__annotations__})
        view.__dict__.update(_within=None)
        view.__dict__.update(changes)
        return view

    # order and views --------------------------------------------------------------------------------------------------

    @staticmethod
    def order(query_lens: Tensor | Sequence[int], decode_width: int = 1) -> list[int]:
        """The stable permutation that puts decode rows first: apply it to the requests, then build the batch."""
        query: list[int] = checks.host_lengths("query_lens", query_lens).tolist()
        return sorted(range(len(query)), key=lambda row: query[row] != decode_width)

    def with_pages(
        self,
        block_table: Tensor | None,
        slot_mapping: Tensor | None,
        *,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> Batch:
        """The same step as another group sees it. What derives from lengths alone is shared, whoever reads it first."""
        checks.one_device(self.device, {"block_table": block_table, "slot_mapping": slot_mapping})
        view = self._like()
        view._take_pages(block_table, slot_mapping, page_size, num_pages)
        return view

    @cached_property
    def decode_part(self) -> Batch | None:
        """The decode rows alone: the whole batch where there are no others, None where there are none."""
        return self._rows(0, self.num_decode_rows)

    @cached_property
    def rest_part(self) -> Batch | None:
        """The rows that are not decode rows: the whole batch where all are, None where none is."""
        return self._rows(self.num_decode_rows, self.num_seqs)

    def _rows(self, lo: int, hi: int) -> Batch | None:
        if lo == hi:
            return None
        if (lo, hi) == (0, self.num_seqs):
            return self
        slots, split = self.slot_mapping, self.num_decode_tokens
        if self.attn_type != "decoder":  # the new keys of cross attention do not line up with its tokens
            slots = None
        elif slots is not None:
            slots = slots[split:] if lo else slots[:split]
        return self._like(
            lengths=self.lengths.rows(lo, hi),
            block_table=None if self.block_table is None else self.block_table[lo:hi],
            slot_mapping=slots,
            tree_mask=None if lo else self.tree_mask,
            bidirectional_spans=None if self.bidirectional_spans is None else self.bidirectional_spans[lo:hi],
            num_decode_rows=0 if lo else hi,
            _within=(self, lo, hi),
        )

    def ragged(self, kv_lens: Tensor, *, causal: bool) -> Batch:
        """The same queries over ragged keys in memory instead of pages (materialised MLA).

        ``kv_lens`` int32 on the host, 0 allowed. ``causal=False`` reads as ``encoder_only``: every query sees all keys.
        """
        lengths = Lengths(self.query_lens, kv_lens, self.device)
        return self._like(
            lengths=lengths,
            attn_type="decoder" if causal else "encoder_only",
            block_table=None,
            slot_mapping=None,
            tree_mask=None,
            bidirectional_spans=None,
            num_decode_rows=self.num_decode_rows if causal else 0,
        )

    def padded(self, num_seqs: int) -> Batch:
        """Decode rows filled up to ``num_seqs`` with padding rows, as a captured graph needs them.

        A padding row has query length ``decode_width``, kv length 1, page 0 and slots -1.
        """
        extra = num_seqs - self.num_seqs
        if extra == 0:
            return self
        if extra < 0 or self.num_decode_rows != self.num_seqs:
            raise BadInputError(
                f"Batch: cannot pad {self.num_seqs} rows ({self.num_decode_rows} of them decode rows) to {num_seqs}; "
                "only batches of decode rows grow"
            )
        width, device, lengths = self.decode_width, self.device, self.lengths
        ones = torch.ones(extra, dtype=torch.int32)
        more = Lengths(
            torch.cat((lengths.query, ones * width)),
            torch.cat((lengths.kv, ones)),
            device,
            kv_device=None if lengths.exact else torch.cat((lengths.kv_on_device, ones.to(device))),
            exact=lengths.exact,
        )
        table, slots, mask, spans = self.block_table, self.slot_mapping, self.tree_mask, self.bidirectional_spans
        if table is not None:
            table = torch.cat((table, table.new_zeros(extra, table.shape[1])))
        if slots is not None and self.attn_type == "decoder":
            slots = torch.cat((slots, slots.new_full((extra * width,), -1)))
        if mask is not None:
            mask = torch.cat((mask, torch.eye(width, dtype=torch.bool, device=device).expand(extra, -1, -1)))
        return self._like(
            lengths=more,
            block_table=table,
            slot_mapping=slots,
            tree_mask=mask,
            bidirectional_spans=None if spans is None else spans + ((),) * extra,
            num_decode_rows=num_seqs,
        )

    # lengths ----------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def exact(self) -> bool:
        """Whether the host's ``kv_lens`` are the true lengths, not upper bounds."""
        return self.lengths.exact

    @property
    def num_seqs(self) -> int:
        return len(self.lengths.queries)

    @property
    def num_tokens(self) -> int:
        """Query tokens in all."""
        return self.lengths.num_tokens

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decode_rows * self.decode_width

    @property
    def max_query_len(self) -> int:
        return self.lengths.max_query

    @property
    def max_kv_len(self) -> int:
        """The longest (or the largest bound, when not exact)."""
        return self.lengths.max_kv

    @property
    def query_lens(self) -> Tensor:
        """int32 ``(num_seqs,)``, host."""
        return self.lengths.query

    @property
    def query_lens_device(self) -> Tensor:
        """int32 ``(num_seqs,)``, device."""
        return self.lengths.query_on_device

    @property
    def kv_lens(self) -> Tensor:
        """int32 ``(num_seqs,)``, host; upper bounds when not ``exact``."""
        return self.lengths.kv

    @property
    def kv_lens_device(self) -> Tensor:
        """int32 ``(num_seqs,)``, device; always the true lengths."""
        return self.lengths.kv_on_device

    @property
    def cu_query_lens(self) -> Tensor:
        """Cumulative query lengths, int32 ``(num_seqs + 1,)``, host."""
        return self.lengths.cu_query

    @property
    def cu_query_lens_device(self) -> Tensor:
        """Cumulative query lengths, int32 ``(num_seqs + 1,)``, device."""
        return self.lengths.cu_query_on_device

    @property
    def cu_kv_lens(self) -> Tensor:
        """Cumulative key lengths, int32 ``(num_seqs + 1,)``, host; of the bounds when not ``exact``."""
        return self.lengths.cu_kv

    @property
    def cu_kv_lens_device(self) -> Tensor:
        """Cumulative key lengths, int32 ``(num_seqs + 1,)``, device; always of the true lengths."""
        return self.lengths.cu_kv_on_device

    # pages ------------------------------------------------------------------------------------------------------------

    def check_pages(self, page_size: int, num_pages: int | None = None) -> int:
        """Raise :class:`BadInputError` unless the table covers ``kv_lens`` and ids and slots lie in the cache.

        Returns how many pages a cache must have, as far as that is known without waiting for a device.
        """
        table, slots, lengths = self.block_table, self.slot_mapping, self.lengths
        need = 0 if slots is None else checks.slot_range(slots, page_size, num_pages)
        if table is None:
            return need
        return max(need, checks.page_ids(table, lengths, page_size, num_pages))

    def csr(self, page_size: int) -> CsrPages:
        """The block table as one list of pages. Needs exact host lengths."""
        if page_size not in self._csr:
            if self._within is not None:
                whole, lo, hi = self._within
                made = whole.csr(page_size).rows(lo, hi)
            else:
                made = csr_pages(self._exact_table("csr"), *self.lengths.pages(page_size))
            self._csr[page_size] = made
        return self._csr[page_size]

    def token_indices(self, page_size: int) -> Tensor:
        """Cache row of every visible key, int64 ``(sum of kv_lens,)`` on the device, cut by ``cu_kv_lens``.

        Needs exact host lengths.
        """
        if page_size not in self._token_indices:
            if self._within is not None:
                whole, lo, hi = self._within
                offsets = whole.cu_kv_lens
                made = whole.token_indices(page_size)[int(offsets[lo]) : int(offsets[hi])]
            else:
                table = self._exact_table("token_indices")
                total = int(self.cu_kv_lens[-1])
                made = key_slots(table, self.cu_kv_lens_device, self.kv_lens_device, total, page_size)
            self._token_indices[page_size] = made
        return self._token_indices[page_size]

    @cached_property
    def _csr(self) -> dict[int, CsrPages]:
        return {}

    @cached_property
    def _token_indices(self) -> dict[int, Tensor]:
        return {}

    def _exact_table(self, form: str) -> Tensor:
        if not self.exact:
            raise BadInputError(
                f"Batch: {form} needs exact kv_lens on the host, but this batch has upper bounds (exact=False); "
                "resolve with host_lengths='bounds', or wait for the lengths"
            )
        if self.block_table is None:
            raise BadInputError(f"Batch: {form} needs a block_table, and this batch has none")
        return self.block_table

    def __repr__(self) -> str:
        rest = self.num_seqs - self.num_decode_rows
        return (
            f"Batch({self.attn_type}, {self.num_decode_rows} decode rows of {self.decode_width}, {rest} others, "
            f"{self.num_tokens} tokens, longest kv {self.max_kv_len}{'' if self.exact else ' (bound)'}, {self.device})"
        )
