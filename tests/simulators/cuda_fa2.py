"""FlashAttention-2 (``flash_attn``): 16-bit, pages of 256, ALiBi, no sinks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from simulators.contract import Contract, Misuse, Refused
from simulators.flash import (
    batched,
    check_heads,
    check_index,
    check_longest,
    forward,
    keys_of_pages,
    keys_of_rows,
    lengths_of,
    packed_edges,
)
from simulators.standin import StandIn

FACTS = Contract.load("flash_attn_2")


def stand_in() -> StandIn:
    return StandIn(
        "flash_attn_2",
        {"flash_attn.flash_attn_varlen_func": varlen, "flash_attn.flash_attn_with_kvcache": with_kvcache},
    )


def varlen(a: SimpleNamespace) -> Any:
    where, batch = "flash_attn_varlen_func", a.cu_seqlens_q.shape[0] - 1
    if a.dropout_p:
        raise NotImplementedError(f"{where}: this stand-in knows no dropout")
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        check_index(where, name, getattr(a, name), a.q.device, (batch + 1,))
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    if a.block_table is None:
        k_edges = packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])
        keys = keys_of_rows(where, a.k, a.v, k_edges)
    else:
        check_index(where, "block_table", a.block_table, a.q.device, (batch, None))
        FACTS.require("page_size", a.k.shape[1], where)
        lengths = (a.cu_seqlens_k[1:] - a.cu_seqlens_k[:-1]).tolist()
        keys = keys_of_pages(where, a.k, a.v, a.block_table, lengths)
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, [k.shape[0] for k, _ in keys])
    out, lse = _attend(where, a, a.q, edges, keys, a.k, a.v)
    return (out, lse, None) if a.return_attn_probs else out


def with_kvcache(a: SimpleNamespace) -> Any:
    where = "flash_attn_with_kvcache"
    unknown = ("k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad")
    if given := [n for n in unknown if getattr(a, n) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {', '.join(given)}")
    if a.q.dim() != 4:
        raise Refused(f"{where}: q must be (batch, queries, heads, width)")
    batch, queries = a.q.shape[:2]
    check_index(where, "block_table", a.block_table, a.q.device, (batch, None))
    check_index(where, "cache_seqlens", a.cache_seqlens, a.q.device, (batch,))
    FACTS.require("page_size", a.k_cache.shape[1], where)
    FACTS.require("num_splits", a.num_splits, where)
    keys = keys_of_pages(where, a.k_cache, a.v_cache, a.block_table, a.cache_seqlens.tolist())
    edges = [(i * queries, (i + 1) * queries) for i in range(batch)]
    out, lse = _attend(where, a, a.q.flatten(0, 1), edges, keys, a.k_cache, a.v_cache)
    out, lse = out.unflatten(0, (batch, queries)), batched(lse, batch)
    return (out, lse) if a.return_softmax_lse else out


def _attend(where: str, a: SimpleNamespace, q: Tensor, edges: Any, keys: Any, k: Tensor, v: Tensor) -> Any:
    check_heads(FACTS, where, q, k, v)
    if q.shape[-1] != v.shape[-1]:
        raise Refused(f"{where}: k and v must have the same width")
    if a.alibi_slopes is not None:
        shapes = ((q.shape[-2],), (len(edges), q.shape[-2]))
        if a.alibi_slopes.dtype.itemsize != 4 or tuple(a.alibi_slopes.shape) not in shapes:
            raise Refused(f"{where}: alibi_slopes must be float32 (heads,) or (batch, heads)")
        if a.alibi_slopes.device != q.device:
            raise Refused(f"{where}: alibi_slopes must be on q's device")
    if a.softcap < 0:
        raise Misuse(f"{where}: softcap {a.softcap} is negative")
    out, lse = forward(
        q, edges, keys, scale=q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale,
        causal=a.causal, window=a.window_size, softcap=a.softcap, slopes=a.alibi_slopes,
    )  # fmt: skip
    return out, lse.masked_fill(lse == -float("inf"), float("inf"))
