"""What an attention mask of transformers says, as ragged lengths. What lengths cannot say is refused.

A mask is ``(batch or 1, 1, queries, keys)``, bool (True = attend) or additive floats (0 = attend, the most negative
number = do not), or None. Every entry in a real token's row is compared with what its lengths imply, so that a mask
with any other meaning (packed documents, prefixes, biases, heads) raises :class:`AttnCoreError`. Rows of padding tokens
are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.spec import AttentionSpec

_ALLOWED = (
    "this integration reads padding on the left or right of each sequence, unwritten keys of a static cache, and the "
    "causality, windows and chunks of the model itself"
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The real queries of a padded batch and the keys they see. Sequences without any are left out; those with a single
    query come first, as :class:`attn_core.Batch` wants them."""

    sequences: tuple[int, ...]
    """Places in the batch."""
    first_query: tuple[int, ...]
    query_lens: tuple[int, ...]
    first_key: tuple[int, ...]
    kv_lens: tuple[int, ...]
    """Keys from the first one that any query sees to the last query's last."""

    def places(self, batch: int, length: int, device: torch.device) -> Tensor | None:
        """Where the real queries lie in the flattened ``(batch * length,)``, int64; None when all are real and lie in
        order."""
        if self.sequences == tuple(range(batch)) and set(self.query_lens) == {length}:
            return None
        starts = [s * length + q for s, q in zip(self.sequences, self.first_query)]
        found = [torch.arange(a, a + n) for a, n in zip(starts, self.query_lens)]
        return torch.cat(found or [torch.arange(0)]).to(device)


def read_mask(mask: Tensor | None, spec: AttentionSpec, batch: int, queries: int, keys: int) -> Rows:
    """The lengths behind a mask for layers of ``spec``, having verified that it says nothing else."""
    if mask is None:
        return _without_mask(spec, batch, queries, keys)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, queries, keys):
        raise AttnCoreError(
            f"attention mask of shape {tuple(mask.shape)} is not supported: expected ({batch}, 1, {queries}, {keys}), "
            f"the same for all heads, as queries and keys have it; {_ALLOWED}"
        )
    return _READERS[spec.attn_type](_visible(mask)[:, 0], spec, batch, queries)


def _without_mask(spec: AttentionSpec, batch: int, queries: int, keys: int) -> Rows:
    """No mask: all queries are real. A causal layer gets none for one query over all keys, and for queries that begin
    with the first key, where keys after the last query are those of a static cache that are yet to come."""
    if spec.attn_type == "encoder_only" and queries != keys:
        raise AttnCoreError(f"{queries} queries over {keys} keys in an encoder layer: caches and prefixes {_ARE_NOT}")
    if spec.causal and keys < queries:
        raise AttnCoreError(f"{queries} queries over {keys} keys in a causal layer without a mask {_ARE_NOT}")
    seen = queries if spec.causal and queries > 1 else keys
    zeros = (0,) * batch
    return Rows(
        sequences=tuple(range(batch)), first_query=zeros, query_lens=(queries,) * batch, first_key=zeros,
        kv_lens=(seen,) * batch,
    )  # fmt: skip


_ARE_NOT = "are not supported here; use 'sdpa' or 'eager'"


def _encoder(seen: Tensor, spec: AttentionSpec, batch: int, queries: int) -> Rows:
    """``spec.sliding_window`` is W, |i-j| < W."""
    if seen.shape[2] != queries:
        raise AttnCoreError(f"{queries} queries over {seen.shape[2]} keys in an encoder layer {_ARE_NOT}")
    seen = _narrowed(seen)
    keys = seen.any(1)
    expected, window = keys[:, None], spec.sliding_window
    if window is not None and window < queries:
        place = torch.arange(queries, device=seen.device)
        near = (place > place[:, None] - window) & (place < place[:, None] + window)
        expected = expected & near
    _agree((seen == expected) | ~keys[:, :, None])
    first, count = _runs(keys, batch)
    return _rows(first, count, first, count)


def _cross(seen: Tensor, spec: AttentionSpec, batch: int, queries: int) -> Rows:
    """All queries see the same keys; which queries are padding is not said, so all are real."""
    seen = _narrowed(seen)
    keys = seen.any(1)
    _agree(seen == keys[:, None])
    first, count = _runs(keys, batch)
    return _rows([0] * batch, [queries if n else 0 for n in count], first, count)


def _decoder(seen: Tensor, spec: AttentionSpec, batch: int, queries: int) -> Rows:
    """Query i is the token at key ``start + i``. Windows count tokens, so any key may be called the first; chunks begin
    at a sequence's first token, and so does a run of keys that some chunk's first query sees."""
    device, width = seen.device, seen.shape[2]
    query, key = torch.arange(queries, device=device), torch.arange(width, device=device)
    last = width - 1 - seen.flip(2).view(torch.uint8).argmax(2)
    start = int(torch.where(seen.any(2), last - query, -1).amax())
    if start < 0 and not bool(seen.any()):
        return _rows([0] * batch, [0] * batch, [0] * batch, [0] * batch)
    if start < 0 or start + queries > width:
        raise _more_than_padding()
    keys, position = seen.any(1), start + query
    real = keys[:, start : start + queries]
    first, count = _runs(keys, batch)
    expected = keys[:, None] & (key <= position[:, None])
    if spec.sliding_window is not None:
        expected &= key > position[:, None] - spec.sliding_window
    if spec.attention_chunk is not None:
        origin = torch.tensor(first[: len(seen)], device=device)[:, None]
        mine, theirs = ((x - origin).div(spec.attention_chunk, rounding_mode="floor") for x in (position, key))
        expected &= mine[:, :, None] == theirs[:, None]
    _agree((seen == expected) | ~real[:, :, None])
    first_query = [max(a - start, 0) for a in first]
    end = [min(a + n, start + queries) for a, n in zip(first, count)]
    return _rows(first_query, [max(e - start - q, 0) for e, q in zip(end, first_query)], first, [
        e - a for a, e in zip(first, end)
    ])  # fmt: skip


_READERS = {"encoder_only": _encoder, "cross": _cross, "decoder": _decoder}


def _rows(first_query: Sequence[int], queries: Sequence[int], first_key: Sequence[int], keys: Sequence[int]) -> Rows:
    real = [i for i, n in enumerate(queries) if n]
    order = tuple(sorted(real, key=lambda i: queries[i] != 1))
    columns = (tuple(column[i] for i in order) for column in (first_query, queries, first_key, keys))
    return Rows(sequences=order, **dict(zip(("first_query", "query_lens", "first_key", "kv_lens"), columns)))


def _narrowed(seen: Tensor) -> Tensor:
    """One row where it is shown to all queries: what transformers makes of padding alone."""
    return seen[:, :1] if seen.stride(1) == 0 else seen


def _runs(keys: Tensor, batch: int) -> tuple[list[int], list[int]]:
    """Start and length of each sequence's only run of keys, ``(batch or 1, keys)`` bool. Raises for several runs."""
    runs = (keys[:, 1:] & ~keys[:, :-1]).sum(1) + keys[:, 0]
    first, count, most = torch.stack((keys.to(torch.uint8).argmax(1), keys.sum(1), runs)).expand(-1, batch).tolist()
    if max(most) > 1:
        raise _more_than_padding()
    return first, count


def _agree(same: Tensor) -> None:
    if not bool(same.all()):
        raise _more_than_padding()


def _more_than_padding() -> AttnCoreError:
    return AttnCoreError(f"attention mask hides or shows more than padding does, which is not supported; {_ALLOWED}")


def _visible(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise AttnCoreError(f"attention mask of {mask.dtype} is not supported; give bool, or floats added to logits")
    hidden = mask <= torch.finfo(mask.dtype).min / 2  # transformers uses the minimum, others -inf
    shown = mask == 0
    if not bool((shown | hidden).all()):
        raise AttnCoreError(f"attention mask adds numbers to logits: a bias is not supported here; {_ALLOWED}")
    return shown
