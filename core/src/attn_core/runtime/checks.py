"""What a batch must satisfy before any kernel sees it. Failures say what was given, what is allowed, what to do."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import BadInputError
from attn_core.runtime.lengths import Lengths

Spans = tuple[tuple[tuple[int, int], ...], ...]


def host_lengths(name: str, value: Any) -> Tensor:
    """``value`` as an int32 host tensor of one dimension, at least one entry."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise BadInputError(
                f"Batch: {name} lies on {value.device}; lengths must be on the host. Where only the device knows them, "
                "pass upper bounds here, the tensor as kv_lens_device, and exact=False"
            )
        if value.dtype != torch.int32 or value.dim() != 1:
            raise BadInputError(
                f"Batch: {name} has dtype {value.dtype} and shape {tuple(value.shape)}; it must be torch.int32 and "
                "(num_seqs,)"
            )
        tensor = value
    else:
        try:
            tensor = torch.tensor([operator.index(v) for v in value], dtype=torch.int32)
        except (TypeError, RuntimeError, OverflowError) as e:
            raise BadInputError(f"Batch: {name} must be a list of integers or an int32 tensor ({e})") from None
    if not tensor.numel():
        raise BadInputError(f"Batch: {name} is empty; skip a step without sequences")
    return tensor


def lengths(query: Sequence[int], keys: Sequence[int], attn_type: str, decode_width: int) -> None:
    if len(query) != len(keys):
        raise BadInputError(f"Batch: {len(query)} query_lens but {len(keys)} kv_lens; both have one entry per sequence")
    for name, values in (("query_lens", query), ("kv_lens", keys)):
        if min(values) < 1:
            row = next(i for i, v in enumerate(values) if v < 1)
            raise BadInputError(
                f"Batch: {name}[{row}]={values[row]} must be at least 1; leave sequences without work out of the step"
            )
    if attn_type != "decoder":
        return
    for row, (q, kv) in enumerate(zip(query, keys)):
        if kv < q and not (kv == 1 and q == decode_width):  # the second: a padding row of a captured batch
            raise BadInputError(
                f"Batch: kv_lens[{row}]={kv} is smaller than query_lens[{row}]={q}; kv_lens count the new tokens too "
                "(attn_type='cross' takes encoder lengths)"
            )


def decode_rows_first(query: Sequence[int], decode_width: int, stated: int | None) -> int:
    """How many leading rows are decode rows; raises when one comes later, unless their number is ``stated``."""
    count = next((i for i, q in enumerate(query) if q != decode_width), len(query))
    if stated is not None:
        if not 0 <= stated <= count:
            raise BadInputError(
                f"Batch: num_decode_rows={stated}, but {count} leading rows have query length {decode_width} "
                "(decode_width); it may be that or less"
            )
        return stated
    for row in range(count + 1, len(query)):
        if query[row] == decode_width:
            raise BadInputError(
                f"Batch: row {row} is a decode row (query length {decode_width} = decode_width) but comes after row "
                f"{count} with query length {query[count]}; decode rows come first: reorder the requests by "
                "Batch.order(query_lens, decode_width)"
            )
    return count


def tensor(name: str, value: Tensor | None, dtype: torch.dtype, shape: tuple[int | None, ...], say: str) -> None:
    """dtype and shape of a device tensor; ``None`` in ``shape`` admits any size, ``say`` names the shape in words."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise BadInputError(f"Batch: {name} is {type(value).__name__}; it must be a {dtype} tensor {say}")
    fits = value.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape))
    if value.dtype != dtype or not fits:
        raise BadInputError(
            f"Batch: {name} has dtype {value.dtype} and shape {tuple(value.shape)}; it must be {dtype} and {say}"
            + (f" = {shape}" if None not in shape else "")
        )


def one_device(given: torch.device | str | None, tensors: Mapping[str, Tensor | None]) -> torch.device:
    """The device all tensors share, or the one given; CPU when nothing says."""
    found = {name: t.device for name, t in tensors.items() if isinstance(t, Tensor)}
    device = next(iter(found.values())) if found else torch.device(given or "cpu")
    named = {**({"device": torch.device(given)} if given is not None else {}), **found}
    for name, d in named.items():
        if not same_device(d, device):
            where = ", ".join(f"{n} on {v}" for n, v in named.items())
            raise BadInputError(f"Batch: {name} is on another device than the rest ({where}); move them together first")
    return device


def same_device(a: torch.device, b: torch.device) -> bool:
    """Equal types, and equal indices where both have one (``cuda`` means the current device)."""
    return a.type == b.type and (a.index == b.index or a.index is None or b.index is None)


def tree_mask(mask: Tensor | None, rows: int, width: int) -> None:
    tensor("tree_mask", mask, torch.bool, (rows, width, width), "(num_decode_rows, decode_width, decode_width)")
    if mask is not None and mask.device.type == "cpu" and not bool(mask.diagonal(dim1=1, dim2=2).all()):
        raise BadInputError("Batch: tree_mask hides a token from itself; its diagonal must be True")


def spans(value: Any, keys: Sequence[int]) -> Spans | None:
    """Spans per sequence, each ``(start, end)`` with ``end`` exclusive, ascending, disjoint, inside the sequence."""
    if value is None:
        return None
    try:
        read = tuple(tuple((operator.index(a), operator.index(b)) for a, b in row) for row in value)
    except (TypeError, ValueError):
        raise BadInputError(
            "Batch: bidirectional_spans must hold, for every sequence, a list of (start, end) key positions"
        ) from None
    if len(read) != len(keys):
        raise BadInputError(f"Batch: bidirectional_spans for {len(read)} sequences, but there are {len(keys)}")
    for row, (pairs, kv) in enumerate(zip(read, keys)):
        before = 0
        for start, end in pairs:
            if not before <= start < end <= kv:
                raise BadInputError(
                    f"Batch: bidirectional_spans[{row}] holds ({start}, {end}); spans must be non-empty, ascending, "
                    f"disjoint and lie whole within the {kv} keys: schedule a span's tokens in one step"
                )
            before = end
    return read


def slots(slot_mapping: Tensor | None, attn_type: str, num_tokens: int, num_keys: int) -> None:
    tensor("slot_mapping", slot_mapping, torch.int64, (None,), "(num_new_keys,)")
    if slot_mapping is None:
        return
    count = slot_mapping.shape[0]
    if attn_type == "decoder" and count != num_tokens:
        raise BadInputError(
            f"Batch: slot_mapping has {count} entries for {num_tokens} new tokens; one per token, -1 = do not write"
        )
    if attn_type != "decoder" and count > num_keys:
        raise BadInputError(f"Batch: slot_mapping has {count} entries, more than the {num_keys} keys of the batch")


def page_ids(block_table: Tensor, lengths: Lengths, page_size: int, num_pages: int | None) -> int:
    """Table wide enough, and every id it will be read at a page of the cache. Returns the highest id plus one.

    Ids are read where that costs no synchronisation (a host table), or where ``num_pages`` asks for it; else 0 comes
    back. Bounds are checked for width only: entries past the true length are never read.
    """
    need, width = -(-lengths.max_kv // page_size), block_table.shape[1]
    if need > width:
        keys = lengths.keys
        row = max(range(len(keys)), key=keys.__getitem__)
        raise BadInputError(
            f"Batch: block_table has {width} columns, but row {row} with {keys[row]} keys needs {need} pages of "
            f"{page_size}; allocate pages before building the batch"
        )
    if not lengths.exact or (num_pages is None and block_table.device.type != "cpu"):
        return 0
    if not need:
        return 0
    first_keys = torch.arange(0, need * page_size, page_size, device=block_table.device)
    ids = block_table[:, :need] * (first_keys < lengths.kv_on_device.unsqueeze(1))
    low, high = map(int, torch.aminmax(ids))
    if low < 0 or (num_pages is not None and high >= num_pages):
        wrong = low if low < 0 else high
        row, column = (int(i) for i in (ids == wrong).nonzero()[0])
        have = "page ids are 0 or more" if num_pages is None else f"the cache has pages 0 to {num_pages - 1}"
        raise BadInputError(f"Batch: block_table[{row}, {column}]={wrong}, but {have}; page 0 is the null page")
    return high + 1


def slot_range(slot_mapping: Tensor, page_size: int, num_pages: int | None) -> int:
    """Every slot -1 or a row of the cache; read and answered as :func:`page_ids`."""
    if not slot_mapping.numel() or (num_pages is None and slot_mapping.device.type != "cpu"):
        return 0
    low, high = int(slot_mapping.min()), int(slot_mapping.max())
    if low < -1 or (num_pages is not None and high >= num_pages * page_size):
        wrong = low if low < -1 else high
        have = "" if num_pages is None else f" or 0 to {num_pages * page_size - 1} ({num_pages} pages of {page_size})"
        raise BadInputError(f"Batch: slot_mapping holds {wrong}; slots are -1 (do not write){have or ' or more'}")
    return high // page_size + 1
