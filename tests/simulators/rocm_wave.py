"""SGLang 0.5.23's wrappers of wave kernels (wave-lang 3.9.1): paged decode, and extend over a prefix and new keys."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

from simulators.attend import put
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import Keys, check_heads, check_index, check_longest, forward, lengths_of, packed_edges
from simulators.standin import StandIn

FACTS = Contract.load("sglang_wave")
OPS = "sglang.srt.layers.attention.wave_ops"
DECODE = f"{OPS}.decode_attention.decode_attention_fwd"
SHAPES = f"{OPS}.decode_attention.decode_attention_intermediate_arrays_shapes"
EXTEND = f"{OPS}.extend_attention.extend_attention_wave"
MOST_BYTES = 2**31


def stand_in() -> StandIn:
    return StandIn("sglang_wave", {DECODE: decode, SHAPES: shapes, EXTEND: extend})


def shapes(a: SimpleNamespace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sums = (a.max_kv_splits, a.num_seqs, a.num_query_heads)
    return (*sums, a.head_size_kv), sums


def _launched(where: str, device: torch.device, **tensors: Tensor) -> None:
    """What the launcher makes of its tensors, whatever the kernel does."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        raise Misuse(f"{where}: launched on device {torch.cuda.current_device()}, the tensors are on {device}")
    for name, t in tensors.items():
        if t.device != device:
            raise Refused(f"{where}: {name} is on {t.device}, q on {device}")
        if not t.is_contiguous():
            raise Misuse(f"{where}: {name} is not contiguous: its copy is freed before the launch")


def _buffers(where: str, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor) -> Keys:
    """Keys ``(tokens, kv heads, width)`` of every sequence, by token indices."""
    if k.nbytes >= MOST_BYTES:
        raise Misuse(f"{where}: a cache of {k.nbytes} bytes: its end would be read as zeros")
    edges = indptr.tolist()
    if edges[0] != 0 or edges[-1] > indices.shape[0] or edges != sorted(edges):
        raise Misuse(f"{where}: indptr {edges} reads outside {indices.shape[0]} indices")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < k.shape[0]:
        raise Misuse(f"{where}: an index outside the cache's {k.shape[0]} tokens")
    rows = [indices[b:e].long() for b, e in pairwise(edges)]
    return [(k[row], v[row]) for row in rows]


def _fill(out: Tensor, value: Tensor) -> None:
    if out.is_contiguous():
        put(out, value)


def decode(a: SimpleNamespace) -> None:
    where = "decode_attention_fwd"
    q, k, v = a.q, a.k_buffer, a.v_buffer
    check_heads(FACTS, where, q, k, v)
    FACTS.require("decode_group", q.shape[1] // k.shape[1], where)
    _launched(where, q.device, q=q, k_buffer=k, v_buffer=v, attn_logits=a.attn_logits, maxima=a.attn_logits_max)
    check_index(where, "b_req_idx", a.b_req_idx, q.device, (q.shape[0] + 1,))
    check_index(where, "req_to_token", a.req_to_token, q.device, (None,))
    sums = (a.max_kv_splits, q.shape[0], q.shape[1])
    for t, shape in ((a.attn_logits, (*sums, v.shape[2])), (a.attn_logits_max, sums)):
        if tuple(t.shape) != shape or t.dtype != torch.float32:
            raise Misuse(f"{where}: scratch of {tuple(t.shape)} {t.dtype}, the kernel writes float32 {shape}")
        t.fill_(float("nan"))
    keys = _buffers(where, k, v, a.b_req_idx, a.req_to_token)
    edges = [(i, i + 1) for i in range(q.shape[0])]
    _fill(a.o, forward(q, edges, keys, scale=q.shape[2] ** -0.5, softcap=a.logit_cap)[0])


def extend(a: SimpleNamespace) -> None:
    where = "extend_attention_wave"
    q, k, v = a.q_extend, a.k_extend, a.v_extend
    check_heads(FACTS, where, q, k, v)
    check_heads(FACTS, where, q, a.k_buffer, a.v_buffer)
    _launched(where, q.device, q_extend=q, k_extend=k, v_extend=v, k_buffer=a.k_buffer, v_buffer=a.v_buffer)
    check_index(where, "qo_indptr", a.qo_indptr, q.device, (None,))
    check_index(where, "kv_indptr", a.kv_indptr, q.device, tuple(a.qo_indptr.shape))
    check_index(where, "kv_indices", a.kv_indices, q.device, (None,))
    edges = packed_edges(where, "qo_indptr", a.qo_indptr, q.shape[0])
    if k.shape[0] != q.shape[0]:
        raise Misuse(f"{where}: {k.shape[0]} new keys for {q.shape[0]} queries")
    check_longest(where, "max_seq_len", a.max_seq_len, lengths_of(edges))
    prefix = _buffers(where, a.k_buffer, a.v_buffer, a.kv_indptr, a.kv_indices)
    keys = [(torch.cat((x, k[b:e])), torch.cat((y, v[b:e]))) for (x, y), (b, e) in zip(prefix, edges)]
    scale = a.layer_scaling or q.shape[2] ** -0.5
    _fill(a.output, forward(q, edges, keys, scale=scale, causal=a.is_causal, softcap=a.logit_cap)[0])
