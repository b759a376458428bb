"""AITER at e404860: batch prefill, paged decode, unified attention, ragged attention, MLA decode and prefill."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import by_shape, double, put
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import (
    Keys,
    check_index,
    check_longest,
    forward,
    keys_of_pages,
    keys_of_rows,
    lengths_of,
    packed_edges,
)
from simulators.standin import StandIn

FACTS = Contract.load("aiter")
PREFILL = "aiter.ops.mha.mha_batch_prefill_func"
RAGGED = "aiter.ops.mha.flash_attn_varlen_func"
DECODE = "aiter.ops.attention.paged_attention_v1"
UNIFIED = "aiter.ops.triton.attention.unified_attention.unified_attention"
MLA = "aiter.mla.mla_decode_fwd"
MLA_PREFILL = "aiter.mla.mla_prefill_fwd"


def stand_in() -> StandIn:
    return StandIn(
        "aiter",
        {PREFILL: batch_prefill, RAGGED: varlen, DECODE: paged_decode, UNIFIED: unified, MLA: mla_decode,
         MLA_PREFILL: mla_prefill},
    )  # fmt: skip


def _edges(where: str, a: SimpleNamespace) -> list[tuple[int, int]]:
    check_index(where, "cu_seqlens_q", a.cu_seqlens_q, a.q.device, (None,))
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    return edges


def _window(window: tuple[int, ...]) -> tuple[int, int]:
    """What the kernels make of it: left 0 is none (and then causality alone holds)."""
    return (-1, -1) if window[0] == 0 else (window[0], window[1])


def _heads(where: str, limit: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    FACTS.require_dtype("dtype", q)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise Misuse(f"{where}: q {q.dtype} beside a cache of {k.dtype} without descales")
    FACTS.require(limit, q.shape[-1], where)
    FACTS.require(limit, v.shape[-1], where)
    if q.shape[-2] % k.shape[-2]:
        raise Refused(f"{where}: heads do not divide")


def _sinks(where: str, sinks: Tensor | None, heads: int) -> Tensor | None:
    if sinks is not None and (tuple(sinks.shape) != (heads,) or sinks.dtype != torch.float32):
        raise Refused(f"{where}: sink_ptr must be float32 (heads,)")
    return sinks


def _flat_pages(where: str, indptr: Tensor, indices: Tensor, last: Tensor, page: int) -> tuple[Tensor, list[int]]:
    """A rectangular table and lengths, out of CSR pages."""
    for name, t in (("kv_indptr", indptr), ("kv_page_indices", indices), ("kv_last_page_lens", last)):
        check_index(where, name, t, indptr.device, (None,))
    edges = indptr.tolist()
    if edges[-1] > indices.shape[0]:
        raise Misuse(f"{where}: kv_indptr ends at {edges[-1]}, there are {indices.shape[0]} page indices")
    counts = [e - b for b, e in pairwise(edges)]
    lengths = [(n - 1) * page + int(rest) if n else 0 for n, rest in zip(counts, last.tolist())]
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, (b, e) in enumerate(pairwise(edges)):
        table[row, : e - b] = indices[b:e].cpu()
    return table, lengths


def batch_prefill(a: SimpleNamespace) -> Any:
    where = "mha_batch_prefill_func"
    if a.block_table is not None or a.k.dim() != 4 or a.kv_last_page_lens is None:
        raise NotImplementedError(f"{where}: this stand-in knows lists of pages and caches of four dimensions")
    _heads(where, "ck_head_dim", a.q, a.k, a.v)
    FACTS.require("page_size", a.k.shape[1], where)
    if any(d is not None for d in (a.q_descale, a.k_descale, a.v_descale)):
        raise NotImplementedError(f"{where}: this stand-in knows no 8-bit caches")
    edges = _edges(where, a)
    table, lengths = _flat_pages(where, a.kv_indptr, a.kv_page_indices, a.kv_last_page_lens, a.k.shape[1])
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, lengths)
    keys = keys_of_pages(where, a.k, a.v, table, lengths)
    scale = a.q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    out, lse = forward(
        a.q, edges, keys, scale=scale, causal=a.causal, window=_window(a.window_size), softcap=a.logits_soft_cap,
        sinks=_sinks(where, a.sink_ptr, a.q.shape[1]), slopes=a.alibi_slopes,
    )  # fmt: skip
    out = put(a.out, out)
    return (out, lse) if a.return_lse else out


def varlen(a: SimpleNamespace) -> Any:
    where = "flash_attn_varlen_func"
    if a.block_table is not None or a.bias is not None:
        raise NotImplementedError(f"{where}: this stand-in knows ragged keys without bias")
    if len(a.window_size) != 3:
        raise Refused(f"{where}: window_size has three entries")
    FACTS.require_dtype("dtype", a.q, a.k, a.v)
    edges = _edges(where, a)
    check_index(where, "cu_seqlens_k", a.cu_seqlens_k, a.q.device, (len(edges) + 1,))
    k_edges = packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, lengths_of(k_edges))
    keys = keys_of_rows(where, a.k, a.v, k_edges)
    scale = a.q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    out, lse = forward(
        a.q, edges, keys, scale=scale, causal=a.causal, window=_window(a.window_size), softcap=a.logits_soft_cap,
        sinks=_sinks(where, a.sink_ptr, a.q.shape[1]), slopes=a.alibi_slopes,
    )  # fmt: skip
    for (begin, end), (k, _) in zip(edges, keys):
        if not k.shape[0]:  # what is left in rows without keys is not stated
            out[begin:end], lse[:, begin:end] = float("nan"), float("inf")
    out = put(a.out, out)
    return (out, lse) if a.return_lse else out


def _quantised(where: str, keys: Keys, k_scale: Tensor, v_scale: Tensor) -> Keys:
    return [(double(k) * double(k_scale), double(v) * double(v_scale)) for k, v in keys]


def paged_decode(a: SimpleNamespace) -> Tensor:
    where = "paged_attention_v1"
    q, k, v = a.query, a.key_cache, a.value_cache
    by_shape(where, out=a.out, heads_of_query=q[0])
    FACTS.require("kv_cache_dtype", a.kv_cache_dtype, where)
    FACTS.require("kv_cache_layout", a.kv_cache_layout, where)
    if a.kv_cache_layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    FACTS.require("page_size", k.shape[1], where)
    fp8 = a.kv_cache_dtype != "auto"
    if fp8:
        FACTS.require_dtype("fp8_cache", k, v)
        FACTS.require_dtype("dtype", q)
    else:
        _heads(where, "decode_head_dim", q, k, v)
    FACTS.require("decode_head_dim", q.shape[-1], where)
    if a.mtp != 1 or a.fp8_out_scale is not None or a.alibi_slopes is not None:
        raise NotImplementedError(f"{where}: this stand-in knows one query a row")
    batch = a.block_tables.shape[0]
    check_index(where, "block_tables", a.block_tables, q.device, (batch, None))
    check_index(where, "context_lens", a.context_lens, q.device, (batch,))
    check_index(where, "cu_query_lens", a.cu_query_lens, q.device, (batch + 1,))
    edges = packed_edges(where, "cu_query_lens", a.cu_query_lens, q.shape[0])
    if set(lengths_of(edges)) != {1}:
        raise Misuse(f"{where}: rows of {lengths_of(edges)} queries; it takes one each")
    lengths = a.context_lens.tolist()
    check_longest(where, "max_context_len", a.max_context_len, lengths)
    parts = -(-a.max_context_len // a.partition_size)
    rows = batch * a.mtp * q.shape[1] * parts
    need = rows * v.shape[-1] * a.out.element_size() + 2 * rows * 4
    if a.workspace_buffer.numel() * a.workspace_buffer.element_size() < need:
        raise ValueError(f"workspace has {a.workspace_buffer.numel()} bytes, {need} are needed")
    if not isinstance(a.k_scale, Tensor) or not isinstance(a.v_scale, Tensor) or a.k_scale.numel() != 1:
        raise Refused(f"{where}: k_scale and v_scale are tensors of one element")
    a.workspace_buffer.fill_(255)  # whoever shares it finds out
    keys = keys_of_pages(where, k, v, a.block_tables, lengths)
    if fp8:
        keys = _quantised(where, keys, a.k_scale, a.v_scale)
    window = (a.sliding_window - 1, 0) if a.sliding_window else (-1, -1)
    out, _ = forward(q, edges, keys, scale=a.scale, causal=True, window=window, softcap=a.logits_soft_cap)
    return put(a.out, out)


def unified(a: SimpleNamespace) -> None:
    where = "unified_attention"
    if not a.causal:
        raise AssertionError("Only causal attention is supported")
    if a.q_descale is not None or a.qq_bias is not None or a.shuffled_kv_cache or a.skip_reduce:
        raise NotImplementedError(f"{where}: this stand-in does not know q_descale, qq_bias and shuffled caches")
    fp8 = a.k.element_size() == 1
    if fp8:
        FACTS.require_dtype("fp8_cache", a.k, a.v)
        if a.k_descale is None or a.v_descale is None:
            raise Misuse(f"{where}: an 8-bit cache without descales is read as it stands")
    else:
        _heads(where, "unified_head_dim", a.q, a.k, a.v)
    FACTS.require("unified_head_dim", a.q.shape[-1], where)
    FACTS.require("unified_page_size", a.k.shape[1], where)
    edges = _edges(where, a)
    check_index(where, "seqused_k", a.seqused_k, a.q.device, (len(edges),))
    check_index(where, "block_table", a.block_table, a.q.device, (len(edges), None))
    lengths = a.seqused_k.tolist()
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, lengths)
    keys = keys_of_pages(where, a.k, a.v, a.block_table, lengths)
    if fp8:
        for d in (a.k_descale, a.v_descale):
            if tuple(d.shape) != (len(edges), a.k.shape[2]):
                raise Refused(f"{where}: descales are (rows, kv heads)")
        keys = _quantised(where, keys, a.k_descale.flatten()[0], a.v_descale.flatten()[0])
    if a.sinks is not None and a.sinks.shape[0] != a.q.shape[1]:
        raise AssertionError("Sinks must be num_query_heads size")
    window = (a.window_size[0], 0) if a.window_size[0] >= 0 else (-1, -1)
    out, _ = forward(
        a.q, edges, keys, scale=a.softmax_scale, causal=True, window=window, softcap=a.softcap, sinks=a.sinks,
        slopes=a.alibi_slopes,
    )  # fmt: skip
    put(a.out, out)


def mla_decode(a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    where = "mla_decode_fwd"
    if a.work_meta_data is not None or a.page_size != 1 or a.nhead_kv != 1 or a.q_scale is not None:
        raise NotImplementedError(f"{where}: this stand-in knows bfloat16, pages of one token and no persistent mode")
    lse = _latent(where, "mla_heads", a, causal=a.causal)
    return a.o.new_full((1,), float("nan")), lse.T.contiguous() if a.return_lse else None


def mla_prefill(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    where = "mla_prefill_fwd"
    if not a.o.is_contiguous():
        raise Misuse(f"{where}: o is written as contiguous")
    lse = _latent(where, "mla_prefill_heads", a, causal=True)
    return a.o, (lse.T * 1.4427).reshape(a.o.shape[0], 1, -1, 1)  # in a base that nothing states


def _latent(where: str, heads: str, a: SimpleNamespace, *, causal: bool) -> Tensor:
    """Fills ``o``; LSE is (heads, tokens)."""
    if a.logit_cap > 0:
        raise AssertionError(f"logit_cap={a.logit_cap!r} is not support yet")
    FACTS.require_dtype("mla_dtype", a.q, a.kv_buffer, a.o)
    FACTS.require(heads, a.q.shape[1], where)
    FACTS.require("mla_widths", (a.q.shape[-1], a.o.shape[-1]), where)
    if not a.q.is_contiguous() or a.kv_buffer.shape[1:] != (1, 1, 576):
        raise Misuse(f"{where}: q is read as contiguous, kv_buffer as (tokens, 1, 1, 576)")
    check_index(where, "qo_indptr", a.qo_indptr, a.q.device, (None,))
    edges = packed_edges(where, "qo_indptr", a.qo_indptr, a.q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    table, lengths = _flat_pages(where, a.kv_indptr, a.kv_indices, a.kv_last_page_lens, 1)
    rows = a.kv_buffer.view(-1, 1, 1, 576)
    keys = keys_of_pages(where, rows, rows[..., :512], table, lengths)
    poison = 0.0 if bool(rows[0].isfinite().all()) else float("nan")
    scale = 576**-0.5 if a.sm_scale is None else a.sm_scale
    out, lse = forward(a.q, edges, keys, scale=scale, causal=causal)
    put(a.o, out + poison)
    return lse
