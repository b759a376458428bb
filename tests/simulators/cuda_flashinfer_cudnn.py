"""cuDNN through FlashInfer's functions without a wrapper, over pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import by_shape, finish, put, seen, sequence
from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS, base2, check_workspace
from simulators.flash import check_index, check_longest, keys_of_pages, lengths_of, packed_edges


def cudnn_prefill(a: SimpleNamespace) -> Any:
    where, q = "cudnn_batch_prefill_with_kv_cache", a.q
    if a.backend is not None or a.q_scale is not None or a.block_tables is None or a.is_cuda_graph_compatible:
        raise NotImplementedError(f"{where}: this stand-in knows 16-bit pages through cuDNN's graphs")
    FACTS.require("cudnn_prefill_head_dims", (q.shape[-1], a.v_cache.shape[-1]), where)
    by_shape(where, q=q)
    tokens, heads = q.shape[:2]
    rows = _rows(where, a, q, a.actual_seq_lens_kv)
    if a.actual_seq_lens_q is None and a.batch_offsets_units != "tokens":
        raise Refused(f"{where}: lengths of queries are left out with offsets of tokens only")
    if rows > 1 and a.batch_offsets_q is None:
        raise Refused(f"{where}: packed q needs batch_offsets_q")
    if a.batch_offsets_units == "elements":
        raise Misuse(f"{where}: offsets are read as elements, where those of tokens were given")
    check_index(where, "batch_offsets_q", a.batch_offsets_q, q.device, (rows + 1,))
    edges = packed_edges(where, "batch_offsets_q", a.batch_offsets_q, tokens)
    keys, lens = _keys(where, a, rows)
    check_longest(where, "max_token_per_sequence", a.max_token_per_sequence, lengths_of(edges))
    single = a.max_token_per_sequence == 1 and heads != a.k_cache.shape[1]
    padded = (rows, a.max_token_per_sequence, heads)
    if a.lse is not None and tuple(a.lse.shape) not in (padded, (tokens, heads)):
        raise Refused(f"{where}: lse is {tuple(a.lse.shape)}, not {padded}")
    if a.lse is not None and tuple(a.lse.shape) != padded and a.batch_offsets_stats is None:
        raise Refused(f"{where}: a packed lse needs batch_offsets_stats")
    parts = []
    for (b, e), (k, v), n in zip(edges, keys, lens):
        parts.append(sequence(q[b:e], k, v, seen(e - b, n, causal=a.causal), scale=a.scale))
    out, lse = finish(parts, q)
    out = put(a.out, out)
    if not a.return_lse:
        return out, None
    lse = lse.T.contiguous() if a.lse_base == "ln" else base2(lse)
    if single:
        first = torch.arange(heads) % (heads // a.k_cache.shape[1]) == 0
        lse = lse.where(first.to(lse.device), float("nan"))
    if a.lse is not None and tuple(a.lse.shape) != padded:
        return out, a.lse.copy_(lse)
    wide = lse.new_full(padded, float("nan")) if a.lse is None else a.lse
    for row, (b, e) in zip(wide, edges):
        row[: e - b] = lse[b:e]
    return out, wide


def cudnn_decode(a: SimpleNamespace) -> Any:
    where, q, width = "cudnn_batch_decode_with_kv_cache", a.q, a.q_len_per_req
    if a.sinks is not None or a.batch_offsets_q is not None or a.block_tables is None or a.is_cuda_graph_compatible:
        raise NotImplementedError(f"{where}: this stand-in knows dense queries over pages, without sinks")
    FACTS.require("cudnn_decode_head_dim", q.shape[-1], where)
    if width < 1 or q.shape[0] % width:
        raise Refused(f"{where}: {q.shape[0]} queries are no multiple of q_len_per_req={width}")
    if width > 4:
        raise Misuse(f"{where}: more than four queries per row go to a prefill kernel")
    rows = _rows(where, a, q, a.actual_seq_lens_kv)
    if rows * width != q.shape[0]:
        raise Misuse(f"{where}: lengths of {rows} rows for {q.shape[0]} queries of {width}")
    if a.out is not None and not a.out.is_contiguous():
        raise Refused(f"{where}: out must be contiguous")
    keys, lens = _keys(where, a, rows)
    parts = []
    for i, ((k, v), n) in enumerate(zip(keys, lens)):
        visible = seen(width, n, causal=True, left=a.window_left)
        parts.append(sequence(q[i * width : (i + 1) * width], k, v, visible, scale=a.scale))
    out, lse = finish(parts, q)
    out = put(a.out, out)
    return (out, base2(lse)) if a.return_lse else out


def _rows(where: str, a: SimpleNamespace, q: Tensor, lens: Any) -> int:
    FACTS.require_dtype("dtype", q, a.k_cache, a.v_cache)
    if not q.dtype == a.k_cache.dtype == a.v_cache.dtype:
        raise Refused(f"{where}: q and the cache have one 16-bit dtype")
    check_workspace(where, a.workspace_buffer, q.device)
    if not isinstance(lens, Tensor) or lens.dtype != torch.int32 or lens.device != q.device:
        raise Refused(f"{where}: actual_seq_lens_kv is int32 on q's device")
    if lens.dim() != 4:
        raise Misuse(f"{where}: lengths of shape {tuple(lens.shape)}: rows after the first are read wrongly")
    return int(lens.shape[0])


def _keys(where: str, a: SimpleNamespace, rows: int) -> Any:
    """Keys per row over caches of (pages, heads, page, width), and their lengths."""
    FACTS.require("cudnn_page_size", a.k_cache.shape[2], where)
    check_index(where, "block_tables", a.block_tables, a.q.device, (rows, None))
    lens = a.actual_seq_lens_kv.flatten().tolist()
    check_longest(where, "max_sequence_kv", a.max_sequence_kv, lens)
    if a.max_sequence_kv > a.block_tables.shape[1] * a.k_cache.shape[2]:
        raise Misuse(f"{where}: max_sequence_kv={a.max_sequence_kv} walks beyond the table")
    caches = (t.transpose(1, 2) for t in (a.k_cache, a.v_cache))
    return keys_of_pages(where, *caches, a.block_tables, lens), lens
