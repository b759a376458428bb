"""FlashAttention-4 (``flash_attn.cute``), as it is on the sm_100 family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from simulators.contract import Contract, Misuse, Refused
from simulators.flash import (
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

FACTS = Contract.load("flash_attn_4")


def stand_in() -> StandIn:
    return StandIn("flash_attn_4", {"flash_attn.cute.flash_attn_varlen_func": varlen})


def varlen(a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    where, q = "flash_attn_varlen_func", a.q
    unknown = (
        "qv", "seqused_q", "gather_kv_indices", "score_mod", "mask_mod", "aux_tensors", "block_sparse_tensors",
        "scheduler_metadata", "seqlen_k_per_split", "min_seqlen_k",
    )  # fmt: skip
    if given := [n for n in unknown if getattr(a, n) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {given}")
    batch = a.cu_seqlens_q.shape[0] - 1
    check_index(where, "cu_seqlens_q", a.cu_seqlens_q, q.device, (batch + 1,))
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    if a.page_table is not None:
        if a.cu_seqlens_k is not None:
            raise Refused(f"{where}: page_table goes with seqused_k, not with cu_seqlens_k")
        check_index(where, "page_table", a.page_table, q.device, (batch, None))
        check_index(where, "seqused_k", a.seqused_k, q.device, (batch,))
        FACTS.require("page_size", a.k.shape[1], where)
        keys = keys_of_pages(where, a.k, a.v, a.page_table, a.seqused_k.tolist())
    else:
        check_index(where, "cu_seqlens_k", a.cu_seqlens_k, q.device, (batch + 1,))
        keys = keys_of_rows(where, a.k, a.v, packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0]))
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, [k.shape[0] for k, _ in keys])
    check_heads(FACTS, where, q, a.k, a.v)
    if q.dtype.itemsize == 1:
        raise NotImplementedError(f"{where}: this stand-in knows 16 bits")
    dims = (q.shape[-1], a.v.shape[-1])
    if max(dims) > 128:
        FACTS.require("wide_head_dims", dims, where)
    sinks = a.learnable_sink
    if sinks is not None:
        FACTS.require_dtype("sinks_dtype", sinks)
        if tuple(sinks.shape) != (q.shape[1],) or dims == (256, 256):
            raise Refused(f"{where}: sinks are (heads,), and width 256 has none")
    window = tuple(-1 if w is None else w for w in a.window_size)
    if -1 in a.window_size and a.window_size != (-1, -1):
        raise Misuse(f"{where}: window_size={a.window_size}: -1 on one side is a window of its own")
    scale: Any = q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    out, lse = forward(q, edges, keys, scale=scale, causal=a.causal, window=window, softcap=a.softcap, sinks=sinks)
    return out, lse if a.return_lse else None
