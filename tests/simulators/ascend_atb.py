"""torch_npu's ATB kernels as 310P has them: paged attention over fractal caches, its cache writer, and formats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import finish, paged, seen, sequence
from simulators.contract import Contract, Misuse, Refused

FACTS = Contract.load("torch_npu", "torch_npu_runtime")
FRACTAL_NZ = 29
MASKED = -10000.0


def empty_with_format(a: SimpleNamespace) -> Tensor:
    FACTS.require("acl_format", a.acl_format)
    made: Any = torch.empty(a.size, dtype=a.dtype, device=a.device)
    made.npu_format = a.acl_format
    return made  # type: ignore[no-any-return]


def get_npu_format(a: SimpleNamespace) -> int:
    return getattr(a.input, "npu_format", 2)


def paged_attention(a: SimpleNamespace) -> None:
    where = "_npu_paged_attention"
    queries = [1] * a.query.shape[0]
    _attend(where, a, queries, [seen(1, n) for n in _lengths(where, a, len(queries))])


def splitfuse(a: SimpleNamespace) -> None:
    """The mask's rows are those of the last queries of a sequence, whatever its length."""
    where = "_npu_paged_attention_splitfuse_v2"
    FACTS.require("atb_mask_type", a.mask_type, where)
    FACTS.require("atb_mask_shape", tuple(a.mask.shape), where)
    FACTS.require_dtype("atb_dtype", a.mask)
    if a.mask.device != a.query.device:
        raise Refused(f"{where}: the mask lies on {a.mask.device}")
    size = a.mask.shape[0]
    if not torch.equal(a.mask.cpu(), torch.full((size, size), MASKED, dtype=torch.float16).triu_(1)):
        raise Misuse(f"{where}: the mask is added: it must be {MASKED} above the diagonal and 0 elsewhere")
    if a.seq_len.device.type != "cpu" or a.seq_len.dtype != torch.int32 or a.seq_len.dim() != 1:
        raise Misuse(f"{where}: seq_len must be int32 on the host, got {a.seq_len.dtype} on {a.seq_len.device}")
    queries = a.seq_len.tolist()
    keys = _lengths(where, a, len(queries))
    if sum(queries) != a.query.shape[0] or any(n > m for n, m in zip(queries, keys)):
        raise Misuse(f"{where}: {queries} queries over {keys} keys are not the {a.query.shape[0]} rows of q")
    _attend(where, a, queries, [seen(n, m, causal=True) for n, m in zip(queries, keys)])


def _lengths(where: str, a: SimpleNamespace, rows: int) -> list[int]:
    FACTS.require("atb_batch", rows, where)
    for name, t, dims in (("context_lens", a.context_lens, 1), ("block_table", a.block_table, 2)):
        if t.dtype != torch.int32 or t.dim() != dims or t.shape[0] != rows:
            raise Refused(f"{where}: {name} is {t.dtype} {tuple(t.shape)}, expected int32 for {rows} rows")
        if t.device != a.query.device:
            raise Misuse(f"{where}: {name} lies on {t.device}: on this device kernels read it there")
    lengths: list[int] = a.context_lens.tolist()
    return lengths


def _attend(where: str, a: SimpleNamespace, queries: list[int], visible: list[Tensor]) -> None:
    tensors = (a.query, a.key_cache, a.value_cache, a.out)
    FACTS.require_dtype("atb_dtype", *tensors)
    if len({t.device for t in tensors}) != 1:
        raise Refused(f"{where}: tensors on several devices")
    heads, width = a.query.shape[1:]
    FACTS.require("atb_head_dim", width, where)
    if heads != a.num_heads or heads % a.num_kv_heads:
        raise Refused(f"{where}: q has {heads} heads, num_heads={a.num_heads}, num_kv_heads={a.num_kv_heads}")
    if a.out.shape != a.query.shape or not a.out.is_contiguous():
        raise Misuse(f"{where}: out must be packed and shaped as q; its strides are not looked at")
    caches = [_rows(where, t, a.num_kv_heads, width) for t in (a.key_cache, a.value_cache)]
    parts, begin, lengths = [], 0, [v.shape[1] for v in visible]
    for n, m, sees, table in zip(queries, lengths, visible, a.block_table):
        try:
            k, v = (paged(t, table, m) for t in caches)
        except IndexError as e:
            raise Misuse(f"{where}: reads outside its pages: {e}") from None
        parts.append(sequence(a.query[begin : begin + n], k, v, sees, scale=a.scale_value))
        begin += n
    a.out.copy_(finish(parts, a.query)[0])


def _rows(where: str, t: Tensor, kv_heads: int, width: int) -> Tensor:
    """A fractal cache as ``(pages, page size, kv heads, width)``."""
    if t.dim() != 4 or t.shape[3] != 16 or t.shape[1] * 16 != kv_heads * width or not t.is_contiguous():
        raise Misuse(f"{where}: a cache of {tuple(t.shape)} is no packed (pages, {kv_heads} * {width} / 16, page, 16)")
    FACTS.require("atb_page_size", t.shape[2], where)
    return t.transpose(1, 2).flatten(2).unflatten(2, (kv_heads, width))


def reshape_and_cache(a: SimpleNamespace) -> None:
    where = "_npu_reshape_and_cache"
    FACTS.require_dtype("atb_slots_dtype", a.slot_indices)
    FACTS.require_dtype("atb_dtype", a.key, a.value, a.key_cache, a.value_cache)
    formats = [get_npu_format(SimpleNamespace(input=t)) for t in (a.key_cache, a.value_cache)]
    if formats != [FRACTAL_NZ, FRACTAL_NZ]:
        raise Misuse(f"{where}: caches in formats {formats} are written as plain ones")
    slots = a.slot_indices.cpu().long()
    if bool((slots < 0).any()):
        raise Misuse(f"{where}: a slot below 0: nothing says what happens")
    for new, cache in ((a.key, a.key_cache), (a.value, a.value_cache)):
        if new.device != cache.device or a.slot_indices.device != cache.device:
            raise Refused(f"{where}: tensors on several devices")
        pages = cache.transpose(1, 2)
        if not cache.is_contiguous() or new[0].numel() != pages[0, 0].numel():
            raise Misuse(f"{where}: keys {tuple(new.shape)} do not fit a cache of {tuple(cache.shape)}")
        one_key_a_slot(where, slots, new)
        page, place = (x.to(cache.device) for x in (slots // cache.shape[2], slots % cache.shape[2]))
        pages[page, place] = new.flatten(1).unflatten(1, (-1, 16))


def one_key_a_slot(where: str, slots: Tensor, new: Tensor) -> None:
    """Slots may repeat only with equal keys."""
    written: dict[int, Tensor] = {}
    for slot, row in zip(slots.tolist(), new.cpu()):
        if not torch.equal(written.setdefault(slot, row), row):
            raise Misuse(f"{where}: slot {slot} is written twice with different keys: which one stays is undefined")
