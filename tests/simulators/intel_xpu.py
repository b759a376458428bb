"""vllm-xpu-kernels 0.1.16.2: one FlashAttention-2 function, paged or ragged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import put
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import (
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

FACTS = Contract.load("intel_xpu")
MODULE = "vllm_xpu_kernels.flash_attn_interface"


def stand_in(*, available: bool = True) -> StandIn:
    reason = None if available else "libze_loader.so.1: cannot open shared object file"
    values = {f"{MODULE}.FA2_AVAILABLE": available, f"{MODULE}.FA2_UNAVAILABLE_REASON": reason}
    return StandIn("intel_xpu", {f"{MODULE}.flash_attn_varlen_func": varlen}, values)


def varlen(a: SimpleNamespace) -> Any:
    where = "flash_attn_varlen_func"
    paged = a.block_table is not None
    if (a.cu_seqlens_k is None) is (a.seqused_k is None) or paged is (a.seqused_k is None):
        raise AssertionError("exactly one of cu_seqlens_k and seqused_k; pages need seqused_k, rows need cu_seqlens_k")
    for name in ("scheduler_metadata", "q_descale", "q_v", "host_kv_lens"):
        if getattr(a, name) is not None:
            raise NotImplementedError(f"{where}: {name}")
    if a.num_splits > 1:
        raise Refused("FA2 does not support num_splits > 1")
    if a.softcap or a.alibi_slopes is not None:
        raise Misuse(f"{where}: softcap and alibi_slopes are taken and ignored")
    if a.dropout_p:
        raise Misuse(f"{where}: dropout")
    q, k, v = a.q, a.k, a.v
    FACTS.require_dtype("dtype", q)
    FACTS.require_dtype("kv_dtype", k, v)
    quantised = k.dtype.itemsize == 1
    if k.dtype != v.dtype or (not quantised and k.dtype != q.dtype):
        raise Refused("query, key and value must have the same dtype")
    if q.dim() != 3 or any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused("query must be in ragged format, last dimensions contiguous")
    for t in (q, v):
        if t.shape[-1] not in FACTS.limit("head_dim"):
            raise Misuse(f"{where}: head_dim={t.shape[-1]} is not compiled: a PyTorch reference takes over, silently")
    if not isinstance(a.max_seqlen_q, int) or not isinstance(a.max_seqlen_k, int):
        raise TypeError(f"{where}: longest lengths are integers, and come before cu_seqlens_q")
    check_index(where, "cu_seqlens_q", a.cu_seqlens_q, q.device, (None,))
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    if paged:
        if a.out is None:
            raise Misuse(f"{where}: a paged call without out writes through an undefined tensor")
        if k.shape[1] not in FACTS.limit("page_size"):
            raise Misuse(f"{where}: pages of {k.shape[1]} are not compiled: a PyTorch reference takes over, silently")
        check_index(where, "block_table", a.block_table, q.device, (len(edges), None))
        check_index(where, "seqused_k", a.seqused_k, q.device, (len(edges),))
        lengths = a.seqused_k.tolist()
        keys = keys_of_pages(where, k, v, a.block_table, lengths)
    else:
        check_index(where, "cu_seqlens_k", a.cu_seqlens_k, q.device, (len(edges) + 1,))
        k_edges = packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, k.shape[0])
        lengths = lengths_of(k_edges)
        keys = keys_of_rows(where, k, v, k_edges)
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, lengths)
    keys = scaled(keys, *(_descale(d, len(edges), k.shape[-2]) for d in (a.k_descale, a.v_descale)))
    if (a.k_descale is None) is not (a.v_descale is None):
        raise Refused("FA2 only supports both KV cache descaled")
    if quantised and a.k_descale is None:
        raise Misuse(f"{where}: an 8-bit cache without its scales")
    if a.s_aux is not None and (a.s_aux.dtype != q.dtype or tuple(a.s_aux.shape) != (q.shape[1],)):
        raise Refused(f"{where}: s_aux must be {q.dtype} (heads,)")
    window = (-1, -1) if a.window_size is None else tuple(a.window_size)
    scale = q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    out, lse = forward(q, edges, keys, scale=scale, causal=a.causal, window=window, sinks=a.s_aux)  # type: ignore[arg-type]
    if a.out is not None and not a.out.is_contiguous():
        raise Misuse(f"{where}: nobody says that out may have gaps")
    out = put(a.out, out)
    return (out, lse) if a.return_softmax_lse else out


def _descale(d: Tensor | None, sequences: int, heads: int) -> Tensor | None:
    if d is None:
        return None
    if d.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AssertionError("must be a float32 or bfloat16 or float16 scalar tensor view")
    if d.untyped_storage().nbytes() != d.element_size():
        raise AssertionError("must be view of single scalar tensor")
    if tuple(d.shape) != (sequences, heads):
        raise Refused(f"descales must be ({sequences}, {heads}), got {tuple(d.shape)}")
    return d
