"""FlashAttention as vLLM ships it (``vllm.vllm_flash_attn``): one function for fa2, fa3 (Hopper) and fa4 (10.x)."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators import cuda_fa3
from simulators.attend import put
from simulators.contract import Contract, Misuse, Refused, Source
from simulators.flash import (
    Keys,
    Metadata,
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

FACTS = Contract.load("vllm_flash_attn")
MODULE = "vllm.vllm_flash_attn"
INF = float("inf")


MAJORS = {2: range(8, 13), 3: range(9, 10), 4: range(9, 12)}
"""fa_version -> majors of the architectures that the wheel has code for (is_fa_version_supported)."""


def stand_in(major: int = 9) -> StandIn:
    """``major``: of the architecture that it runs on."""
    return StandIn(
        "vllm_flash_attn",
        {
            f"{MODULE}.flash_attn_varlen_func": partial(varlen, major),
            f"{MODULE}.get_scheduler_metadata": partial(cuda_fa3.metadata, FACTS),
        },
    )


UNKNOWN = (
    "output_scale", "cp_tot_seqused_k", "mask_mod", "block_sparse_tensors", "aux_tensors", "aux_tensor_leading_dims",
    "dynamic_causal", "gather_kv_indices", "gather_kv_valid_length",
)  # fmt: skip


def varlen(major: int, a: SimpleNamespace) -> Any:
    version = 2 if isinstance(a.fa_version, Source) else a.fa_version  # the default, a constant of the module
    where, q, batch = f"flash_attn_varlen_func(fa_version={version})", a.q, a.cu_seqlens_q.shape[0] - 1
    if major not in MAJORS[version]:
        raise Refused(f"{where}: no kernel image for {major}.x")
    if a.dropout_p or a.return_attn_probs or a.cp_world_size != 1:
        raise NotImplementedError(f"{where}: this stand-in knows neither dropout nor context parallelism")
    if given := [n for n in UNKNOWN if getattr(a, n) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {given}")
    if (a.cu_seqlens_k is None) == (a.seqused_k is None):
        raise Refused(f"{where}: cu_seqlens_k or seqused_k, one of them")
    check_index(where, "cu_seqlens_q", a.cu_seqlens_q, q.device, (batch + 1,))
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    if a.block_table is not None:
        if a.seqused_k is None:
            raise Refused(f"{where}: seqused_k must be provided if block_table is provided")
        check_index(where, "block_table", a.block_table, q.device, (batch, None))
        check_index(where, "seqused_k", a.seqused_k, q.device, (batch,))
        FACTS.require("page_size", a.k.shape[1], where)
        keys = keys_of_pages(where, a.k, a.v, a.block_table, a.seqused_k.tolist())
    elif a.seqused_k is not None:
        raise NotImplementedError(f"{where}: this stand-in knows seqused_k over pages only")
    else:
        check_index(where, "cu_seqlens_k", a.cu_seqlens_k, q.device, (batch + 1,))
        keys = keys_of_rows(where, a.k, a.v, packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0]))
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, [k.shape[0] for k, _ in keys])
    a.window_size = (-1, -1) if a.window_size is None else tuple(a.window_size)
    a.softmax_scale = q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    out, lse = {2: _fa2, 3: _fa3, 4: _fa4}[version](where, a, edges, keys)
    out = put(a.out, out)
    return (out, lse) if a.return_softmax_lse else out


def _fa2(where: str, a: SimpleNamespace, edges: Any, keys: Keys) -> tuple[Tensor, Tensor]:
    q, heads = a.q, a.q.shape[1]
    if a.s_aux is not None:
        raise Refused(f"{where}: FA2 does not support s_aux")
    if any(x is not None for x in (a.scheduler_metadata, a.q_descale, a.k_descale, a.v_descale, a.q_v)):
        raise Misuse(f"{where}: metadata, descales and q_v are dropped")
    FACTS.require("fa2_num_splits", a.num_splits, where)
    FACTS.require_dtype("fa2_dtype", q)
    check_heads(FACTS, where, q, a.k, a.v)
    if q.shape[-1] != a.v.shape[-1]:
        raise Refused(f"{where}: k and v must have the same width")
    if a.alibi_slopes is not None:
        shapes = ((heads,), (len(edges), heads))
        if a.alibi_slopes.dtype != torch.float32 or tuple(a.alibi_slopes.shape) not in shapes:
            raise Refused(f"{where}: alibi_slopes must be float32 (heads,) or (batch, heads)")
        if a.alibi_slopes.device != q.device:
            raise Refused(f"{where}: alibi_slopes must be on q's device")
    swapped = a.max_seqlen_q == 1 and heads > a.k.shape[-2] and a.window_size == (-1, -1) and a.alibi_slopes is None
    if swapped and q.shape[0] != len(edges):
        raise Misuse(f"{where}: row i of q is taken for sequence i")
    out, lse = forward(
        q, edges, keys, scale=a.softmax_scale, causal=a.causal, window=a.window_size, softcap=a.softcap,
        slopes=a.alibi_slopes,
    )  # fmt: skip
    return out, lse.masked_fill(lse == -INF, INF)


def _fa3(where: str, a: SimpleNamespace, edges: Any, keys: Keys) -> tuple[Tensor, Tensor]:
    q = a.q
    if a.alibi_slopes is not None:
        raise Refused(f"{where}: Alibi is not supported in FA3")
    if a.s_aux is not None:
        FACTS.require("sinks_heads", q.shape[1], where)
        if q.shape[-1] != a.v.shape[-1]:
            raise Refused(f"{where}: We don't support S aux with hdim != hdim_v")
    if a.scheduler_metadata is not None:
        wanted = cuda_fa3.scheduling(
            len(edges), a.max_seqlen_q, a.max_seqlen_k, q.shape[1], a.k.shape[-2], q.shape[-1], a.v.shape[-1], q.dtype,
            a.k.shape[1], a.causal, a.window_size, 0, a.softcap > 0, a.num_splits,
        )  # fmt: skip
        Metadata.check(where, a.scheduler_metadata, wanted, a.seqused_k)
    a.qv, a.sinks, a.attention_chunk = a.q_v, a.s_aux, 0
    return cuda_fa3.attend(FACTS, where, a, q, edges, keys, a.k, a.v)


def _fa4(where: str, a: SimpleNamespace, edges: Any, keys: Keys) -> tuple[Tensor, Tensor]:
    q, v, sinks = a.q, a.v, a.s_aux
    if a.alibi_slopes is not None:
        raise Refused(f"{where}: Alibi is not supported in FA4")
    if a.q_v is not None:
        raise NotImplementedError(f"{where}: this stand-in does not know q_v")
    if a.scheduler_metadata is not None:
        raise Misuse(f"{where}: metadata is dropped")
    fp8 = v.dtype == torch.float8_e4m3fn
    FACTS.require_dtype("fa4_dtype", q, a.k, v)
    check_heads(FACTS, where, q, a.k, v)
    if a.block_table is not None:
        FACTS.require("fa4_page_size", a.k.shape[1], where)
    dims = (q.shape[-1], v.shape[-1])
    if max(dims) > 128:
        FACTS.require("fa4_wide_head_dims", dims, where)
    if fp8:
        FACTS.require("fp8_head_dim", dims[0], where)
    descales = (a.k_descale, a.v_descale, a.q_descale)
    cuda_fa3.check_descales(where, descales, fp8=fp8, shape=(len(edges), a.k.shape[-2]))
    if sinks is not None:
        FACTS.require_dtype("fa4_sinks_dtype", sinks)
        if tuple(sinks.shape) != (q.shape[1],):
            raise Refused(f"{where}: sinks must be (heads,)")
    return forward(
        q, edges, scaled(keys, *descales) if fp8 else keys, scale=a.softmax_scale, causal=a.causal,
        window=a.window_size, softcap=a.softcap, sinks=sinks, dtype=torch.bfloat16 if fp8 else None,
    )  # fmt: skip
