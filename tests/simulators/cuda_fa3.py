"""FlashAttention-3 as sglang-kernel ships it (``sgl_kernel.flash_attn``): sinks, attention chunks, qv for MLA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import put
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import (
    Metadata,
    batched,
    check_heads,
    check_index,
    check_longest,
    forward,
    keys_of_pages,
    keys_of_rows,
    lengths_of,
    packed_edges,
    scaled,
)
from simulators.standin import StandIn

FACTS = Contract.load("sgl_kernel_fa3")
MODULE = "sgl_kernel.flash_attn"


def stand_in() -> StandIn:
    return StandIn(
        "sgl_kernel_fa3",
        {
            f"{MODULE}.flash_attn_with_kvcache": with_kvcache,
            f"{MODULE}.flash_attn_varlen_func": varlen,
            f"{MODULE}.get_scheduler_metadata": metadata,
            f"{MODULE}.is_fa3_supported": lambda a: True,
        },
    )


def metadata(a: SimpleNamespace) -> Tensor:
    where = "get_scheduler_metadata"
    check_index(where, "cache_seqlens", a.cache_seqlens, a.cache_seqlens.device, (a.batch_size,))
    FACTS.require("num_splits", a.num_splits, where)
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, a.cache_seqlens.tolist())
    lengths = a.cache_seqlens
    if a.cu_seqlens_k_new is not None:  # counted here, ignored by the forward
        lengths = lengths + a.cu_seqlens_k_new[1:] - a.cu_seqlens_k_new[:-1]
    facts = _facts(
        a.batch_size, a.max_seqlen_q, a.num_heads, a.num_heads_k, a.headdim, a.headdim_v or a.headdim, a.qkv_dtype,
        a.page_size, a.causal, a.window_size, a.attention_chunk, a.has_softcap, a.num_splits,
    )  # fmt: skip
    return Metadata.make(facts, lengths)


def _facts(
    batch: int, max_q: int, heads: int, kv_heads: int, d: int, dv: int, dtype: torch.dtype, page: int | None,
    causal: bool, window: tuple[int, int], chunk: int, softcap: bool, splits: int,
) -> list[Any]:  # fmt: skip
    return [batch, max_q, heads, kv_heads, d, dv, dtype.itemsize, page or 0, causal, *window, chunk, softcap, splits]


def with_kvcache(a: SimpleNamespace) -> Any:
    where = "flash_attn_with_kvcache"
    _unmodelled(where, a, "k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "rotary_seqlens")
    if a.page_table is None or not isinstance(a.cache_seqlens, Tensor):
        raise NotImplementedError(f"{where}: this stand-in knows paged caches with cache_seqlens on the device")
    q, heads, kv_heads = a.q, a.q.shape[-2], a.k_cache.shape[-2]
    batch = a.page_table.shape[0]
    check_index(where, "page_table", a.page_table, q.device, (batch, None))
    check_index(where, "cache_seqlens", a.cache_seqlens, q.device, (batch,))
    if a.cu_seqlens_q is None:
        if q.dim() != 4 or q.shape[0] != batch:
            raise Refused(f"{where}: q must be (batch, queries, heads, width) without cu_seqlens_q")
        rows, edges = q.flatten(0, 1), [(i * q.shape[1], (i + 1) * q.shape[1]) for i in range(batch)]
    else:
        check_index(where, "cu_seqlens_q", a.cu_seqlens_q, q.device, (batch + 1,))
        if q.dim() != 3 or a.max_seqlen_q is None:
            raise Refused(f"{where}: cu_seqlens_q goes with packed q and max_seqlen_q")
        rows, edges = q, packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
        check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    keys = keys_of_pages(where, a.k_cache, a.v_cache, a.page_table, a.cache_seqlens.tolist())
    if a.scheduler_metadata is not None:
        facts = _facts(
            batch, a.max_seqlen_q or q.shape[1], heads, kv_heads, q.shape[-1], a.v_cache.shape[-1], q.dtype,
            a.k_cache.shape[1], a.causal, a.window_size, a.attention_chunk or 0, a.softcap > 0, a.num_splits,
        )  # fmt: skip
        Metadata.check(where, a.scheduler_metadata, facts, a.cache_seqlens)
    out, lse = _attend(where, a, rows, edges, keys, a.k_cache, a.v_cache)
    if a.cu_seqlens_q is None:
        out, lse = out.unflatten(0, (batch, -1)), batched(lse, batch)
    return _result(a, out, lse)


def varlen(a: SimpleNamespace) -> Any:
    where = "flash_attn_varlen_func"
    _unmodelled(where, a, "seqused_q", "page_table")
    q, batch = a.q, a.cu_seqlens_q.shape[0] - 1
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        check_index(where, name, getattr(a, name), q.device, (batch + 1,))
    if a.max_seqlen_q is None or a.max_seqlen_k is None:
        raise Refused(f"{where}: max_seqlen_q and max_seqlen_k must be given with cu_seqlens")
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
    k_edges = packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, lengths_of(k_edges))
    keys = keys_of_rows(where, a.k, a.v, k_edges, a.seqused_k)
    return _result(a, *_attend(where, a, q, edges, keys, a.k, a.v))


def _attend(where: str, a: SimpleNamespace, q: Tensor, edges: Any, keys: Any, k: Tensor, v: Tensor) -> Any:
    _unmodelled(where, a, "score_mod", "aux_tensors")
    fp8 = q.dtype == torch.float8_e4m3fn
    if a.ver != 3 or a.only_qv:
        raise NotImplementedError(f"{where}: this stand-in is version 3 with q")
    if a.qv is None:
        check_heads(FACTS, where, q, k, v)
        if q.shape[-1] != v.shape[-1]:
            FACTS.require("unequal_head_dims", (q.shape[-1], v.shape[-1]), where)
    else:
        FACTS.require_dtype("dtype", q, a.qv, k, v)
        if fp8 or not q.dtype == a.qv.dtype == k.dtype == v.dtype:
            raise Refused(f"{where}: qv is for one 16-bit dtype")
        FACTS.require("qv_head_dim", q.shape[-1], where)
        FACTS.require("qv_v_head_dim", v.shape[-1], where)
    if fp8:
        FACTS.require("fp8_head_dim", q.shape[-1], where)
    FACTS.require("num_splits", a.num_splits, where)
    descales = (a.k_descale, a.v_descale, a.q_descale)
    if any(d is not None for d in descales):
        if not fp8:
            raise Misuse(f"{where}: descales are read for fp8 inputs only; here they would be dropped")
        for d in descales:
            if d is not None and (tuple(d.shape) != (len(edges), k.shape[-2]) or d.dtype != torch.float32):
                raise Refused(f"{where}: descales must be float32 (batch, kv heads)")
    if a.sinks is not None:
        FACTS.require_dtype("sinks_dtype", a.sinks)
        if tuple(a.sinks.shape) != (q.shape[-2],):
            raise Refused(f"{where}: sinks must be (heads,)")
    scale = a.softmax_scale
    if scale is None:
        scale = (q.shape[-1] + (0 if a.qv is None else a.qv.shape[-1])) ** -0.5
    return forward(
        q, edges, scaled(keys, *descales) if fp8 else keys,
        scale=scale, causal=a.causal, window=a.window_size, chunk=a.attention_chunk or 0, softcap=a.softcap,
        sinks=a.sinks, qv=a.qv, dtype=torch.bfloat16 if fp8 else None,
    )  # fmt: skip


def _result(a: SimpleNamespace, out: Tensor, lse: Tensor) -> Any:
    out = put(a.out, out)
    return (out, lse, None, None) if a.return_softmax_lse else out


def _unmodelled(where: str, a: SimpleNamespace, *names: str) -> None:
    if given := [n for n in names if getattr(a, n) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {', '.join(given)}")
