"""A step of transformers' continuous batching as batches of ours: which rows, which keys, where new keys go.

transformers numbers the rows of a layer's cache; ``write_index`` and ``read_index`` are such numbers, the same in every
layer of a kind. With pages of one token they are slots and page ids: nothing is gathered.

A sliding layer keeps a ring of W rows per request, so a prompt's chunk overwrites keys that its own first queries still
see. Rows whose keys do not all fit the ring attend in a scratch cache: at most W-1 keys of the ring are copied there
(none for the first chunk), the new ones are written there, and stored in the ring afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attn_core.errors import AttnCoreError
from attn_core.runtime import Batch

KEYWORDS = frozenset(
    {"cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "write_index", "read_index",
     "block_table", "is_causal", "logits_indices", "logits_processor_args"}
)  # fmt: skip
"""What continuous batching adds to a layer's call. ``is_causal`` is False because a mask comes along, which says no
more than the lengths and the window do."""

WRITTEN_FOR = "this integration was written for transformers 5.20 to 5.23"


@dataclass(frozen=True)
class Part:
    """Rows of one step that attend in one cache."""

    batch: Batch
    tokens: Tensor | None
    """Places of the rows' tokens in the packed step, int64; None: all of them, as they are."""


@dataclass(frozen=True)
class Aside(Part):
    """Rows that attend in the scratch cache; all numbers are int64 cache rows."""

    carried_from: Tensor
    """In the ring: the older keys that they see."""
    carried_to: Tensor
    """In the scratch cache."""
    stored_to: Tensor
    """In the ring: where the new keys are kept; keys that nobody will see go to one row that is never read."""
    size: int
    """Rows of the scratch cache, the null page included."""


@dataclass(frozen=True)
class Step:
    """One step as the layers of one kind see it."""

    num_tokens: int
    """Real tokens; a step padded for compilation has more."""
    here: Part | None
    aside: Aside | None


def read(kwargs: Mapping[str, Any], kind: str, index: int, window: int | None) -> Step:
    """The step behind a call's keywords, for the layers of ``kind`` (``full_attention``, ``sliding_attention``), whose
    indices are the ``index``-th of the lists. Reads the lengths from the device: once per step and kind.

    Raises :class:`AttnCoreError` for keywords that say what this module does not know.
    """
    missing = KEYWORDS - kwargs.keys() - {"logits_indices", "logits_processor_args"}
    if missing or kwargs["block_table"] is not None:
        what = f"without {', '.join(sorted(missing))}" if missing else "with a block_table, for a flash kernel"
        raise AttnCoreError(f"continuous batching called attention {what}; {WRITTEN_FOR}")
    starts: list[int] = kwargs["cu_seq_lens_q"].tolist()
    ends: list[int] = kwargs["cu_seq_lens_k"][kind].tolist()
    query, keys = ([b - a for a, b in pairwise(edges)] for edges in (starts, ends))
    write: Tensor = kwargs["write_index"][index][: starts[-1]]
    slots = _all_keys(kwargs["read_index"][index][: ends[-1]], write, query, ends)
    rows = [row for row in Batch.order(query) if query[row]]  # padding has none
    step = _Rows(query, keys, starts, ends, write, slots)
    here = [row for row in rows if window is None or keys[row] <= window]
    return Step(
        num_tokens=starts[-1],
        here=step.part(here) if here else None,
        aside=step.aside([row for row in rows if row not in set(here)]) if len(here) < len(rows) else None,
    )


def _all_keys(read: Tensor, write: Tensor, query: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Cache row of every key of every request, the new ones included; int64, cut by ``ends``.

    An empty ``read`` means that no request has older keys. Sliding layers mark new keys instead of naming their rows.
    """
    if not read.numel():
        if ends[-1] != len(write):
            raise AttnCoreError(f"continuous batching gave no read_index for {ends[-1]} keys; {WRITTEN_FOR}")
        return write
    new = [key for n, end in zip(query, ends[1:]) for key in range(end - n, end)]
    return read.index_copy(0, torch.tensor(new, device=read.device), write)


@dataclass(frozen=True)
class _Rows:
    """A step's rows: query and key lengths, where their tokens and keys begin, new keys' and all keys' cache rows."""

    query: list[int]
    keys: list[int]
    starts: list[int]
    ends: list[int]
    write: Tensor
    slots: Tensor

    def part(self, rows: list[int]) -> Part:
        tokens = self._tokens(rows)
        table = pad_sequence([self._keys(row) for row in rows], batch_first=True).to(torch.int32)
        return Part(self._batch(rows, table, self._of(self.write, tokens)), tokens)

    def aside(self, rows: list[int]) -> Aside:
        tokens, device = self._tokens(rows), self.write.device
        own: list[Tensor] = []
        first = 1  # row 0 is the null page
        for row in rows:
            own.append(torch.arange(first, first + self.keys[row], device=device))
            first += self.keys[row]
        older = [self.keys[row] - self.query[row] for row in rows]
        new = torch.cat([slots[n:] for slots, n in zip(own, older)])
        table = pad_sequence(own, batch_first=True).to(torch.int32)
        return Aside(
            batch=self._batch(rows, table, new),
            tokens=tokens,
            carried_from=torch.cat([self._keys(row)[:n] for row, n in zip(rows, older)]),
            carried_to=torch.cat([slots[:n] for slots, n in zip(own, older)]),
            stored_to=self._of(self.write, tokens),
            size=first,
        )

    def _batch(self, rows: list[int], table: Tensor, slots: Tensor) -> Batch:
        query, keys = [self.query[row] for row in rows], [self.keys[row] for row in rows]
        return Batch(query, keys, block_table=table, slot_mapping=slots)

    def _keys(self, row: int) -> Tensor:
        return self.slots[self.ends[row] : self.ends[row + 1]]

    def _tokens(self, rows: list[int]) -> Tensor | None:
        places = [at for row in rows for at in range(self.starts[row], self.starts[row + 1])]
        if places == list(range(self.starts[-1])):
            return None
        return torch.tensor(places, device=self.write.device)

    @staticmethod
    def _of(x: Tensor, tokens: Tensor | None) -> Tensor:
        return x if tokens is None else x[tokens]
