"""FlashAttention-3 as sglang-kernel ships it (``sgl_kernel.flash_attn``) and as its own repository builds it
(``flash_attn_interface``): attention chunks and qv for MLA in both, sinks and ``out=`` in the first only."""

from __future__ import annotations

from functools import partial
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
UPSTREAM = Contract.load("flash_attn_3")
MODULE = "sgl_kernel.flash_attn"


def stand_in() -> StandIn:
    return StandIn("sgl_kernel_fa3", {**_answers(FACTS, MODULE), f"{MODULE}.is_fa3_supported": lambda a: True})


def upstream() -> StandIn:
    return StandIn("flash_attn_3", _answers(UPSTREAM, "flash_attn_interface"))


def _answers(facts: Contract, module: str) -> dict[str, Any]:
    return {
        f"{module}.flash_attn_with_kvcache": partial(with_kvcache, facts),
        f"{module}.flash_attn_varlen_func": partial(varlen, facts),
        f"{module}.get_scheduler_metadata": partial(metadata, facts),
    }


def metadata(facts: Contract, a: SimpleNamespace) -> Tensor:
    where = "get_scheduler_metadata"
    check_index(where, "cache_seqlens", a.cache_seqlens, a.cache_seqlens.device, (a.batch_size,))
    facts.require("num_splits", a.num_splits, where)
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, a.cache_seqlens.tolist())
    lengths = a.cache_seqlens
    if a.cu_seqlens_k_new is not None:  # counted here, ignored by the forward
        lengths = lengths + a.cu_seqlens_k_new[1:] - a.cu_seqlens_k_new[:-1]
    heads, kv_heads = _either(a, "num_heads", "num_heads_q"), _either(a, "num_heads_k", "num_heads_kv")
    made = scheduling(
        a.batch_size, a.max_seqlen_q, a.max_seqlen_k, heads, kv_heads, a.headdim, a.headdim_v or a.headdim,
        a.qkv_dtype, a.page_size, a.causal, a.window_size, getattr(a, "attention_chunk", 0), a.has_softcap,
        a.num_splits,
    )  # fmt: skip
    return Metadata.make(made, lengths)


def _either(a: SimpleNamespace, *names: str) -> Any:
    return next(getattr(a, n) for n in names if hasattr(a, n))


def scheduling(
    batch: int, max_q: int, max_k: int, heads: int, kv_heads: int, d: int, dv: int, dtype: torch.dtype,
    page: int | None, causal: bool, window: tuple[int, int], chunk: int, softcap: bool, splits: int,
) -> list[Any]:  # fmt: skip
    """What metadata is made for, beside the lengths."""
    shape = [batch, max_q, max_k, heads, kv_heads, d, dv, dtype.itemsize, page or 0]
    return [*shape, causal, *window, chunk, softcap, splits]


def with_kvcache(facts: Contract, a: SimpleNamespace) -> Any:
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
        page_size = a.k_cache.shape[1]
        wanted = scheduling(
            batch, a.max_seqlen_q or q.shape[1], a.page_table.shape[1] * page_size, heads, kv_heads, q.shape[-1],
            a.v_cache.shape[-1], q.dtype, page_size, a.causal, a.window_size, a.attention_chunk or 0, a.softcap > 0,
            a.num_splits,
        )  # fmt: skip
        Metadata.check(where, a.scheduler_metadata, wanted, a.cache_seqlens)
    out, lse = attend(facts, where, a, rows, edges, keys, a.k_cache, a.v_cache)
    if a.cu_seqlens_q is None:
        out, lse = out.unflatten(0, (batch, -1)), batched(lse, batch)
    out = put(getattr(a, "out", None), out)
    return (out, lse, None, None) if a.return_softmax_lse else out


def varlen(facts: Contract, a: SimpleNamespace) -> Any:
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
    out, lse = attend(facts, where, a, q, edges, keys, a.k, a.v)
    out = put(getattr(a, "out", None), out)
    if hasattr(a, "return_attn_probs"):
        return (out, lse) if a.return_attn_probs else out
    return (out, lse, None, None) if a.return_softmax_lse else out


def attend(
    facts: Contract, where: str, a: SimpleNamespace, q: Tensor, edges: Any, keys: Any, k: Tensor, v: Tensor
) -> Any:
    """The kernel behind every package: ``a`` holds qv, descales, scale, masks, softcap, splits, perhaps sinks."""
    _unmodelled(where, a, "score_mod", "aux_tensors")
    fp8, sinks = q.dtype == torch.float8_e4m3fn, getattr(a, "sinks", None)
    if getattr(a, "ver", 3) != 3 or getattr(a, "only_qv", False):
        raise NotImplementedError(f"{where}: this stand-in is version 3 with q")
    if a.qv is None:
        check_heads(facts, where, q, k, v)
        if q.shape[-1] != v.shape[-1]:
            facts.require("unequal_head_dims", (q.shape[-1], v.shape[-1]), where)
    else:
        facts.require_dtype("dtype", q, a.qv, k, v)
        if fp8 or not q.dtype == a.qv.dtype == k.dtype == v.dtype:
            raise Refused(f"{where}: qv is for one 16-bit dtype")
        facts.require("qv_head_dim", q.shape[-1], where)
        facts.require("qv_v_head_dim", v.shape[-1], where)
    if fp8:
        facts.require("fp8_head_dim", q.shape[-1], where)
    facts.require("num_splits", a.num_splits, where)
    descales = (a.k_descale, a.v_descale, a.q_descale)
    check_descales(where, descales, fp8=fp8, shape=(len(edges), k.shape[-2]))
    if sinks is not None:
        facts.require_dtype("sinks_dtype", sinks)
        if tuple(sinks.shape) != (q.shape[-2],):
            raise Refused(f"{where}: sinks must be (heads,)")
    scale = a.softmax_scale
    if scale is None:
        scale = (q.shape[-1] + (0 if a.qv is None else a.qv.shape[-1])) ** -0.5
    return forward(
        q, edges, scaled(keys, *descales) if fp8 else keys,
        scale=scale, causal=a.causal, window=a.window_size, chunk=a.attention_chunk or 0, softcap=a.softcap,
        sinks=sinks, qv=a.qv, dtype=torch.bfloat16 if fp8 else None,
    )  # fmt: skip


def check_descales(where: str, descales: tuple[Any, ...], *, fp8: bool, shape: tuple[int, int]) -> None:
    for d in descales:
        if d is not None and not fp8:
            raise Misuse(f"{where}: descales are read for fp8 inputs only; here they would be dropped")
        if d is not None and (tuple(d.shape) != shape or d.dtype != torch.float32):
            raise Refused(f"{where}: descales must be float32 (batch, kv heads)")


def _unmodelled(where: str, a: SimpleNamespace, *names: str) -> None:
    if given := [n for n in names if getattr(a, n, None) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {', '.join(given)}")
