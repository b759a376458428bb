"""MATE 0.2.2 (``mate.mha_interface``, ``mate.flashmla``): FlashAttention-3 and latent decode for MP31."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.contract import Contract, Misuse, Refused
from simulators.flash import (
    Keys,
    Metadata,
    batched,
    check_index,
    check_longest,
    forward,
    keys_of_pages,
    keys_of_rows,
    lengths_of,
    packed_edges,
)
from simulators.standin import StandIn

FACTS = Contract.load("mate")
MHA = "mate.mha_interface"
MLA = "mate.flashmla"


def stand_in() -> StandIn:
    return StandIn(
        "mate",
        {
            f"{MHA}.flash_attn_with_kvcache": with_kvcache,
            f"{MHA}.flash_attn_varlen_func": varlen,
            f"{MHA}.get_scheduler_metadata": metadata,
            f"{MLA}.flash_mla_with_kvcache": flash_mla,
            f"{MLA}.get_mla_metadata": mla_metadata,
        },
    )


def _current(like: torch.device) -> torch.device:
    """Where MATE allocates: the current device of the inputs' kind."""
    if like.type == "cpu":
        return like
    return torch.device(like.type, getattr(torch, like.type).current_device())


# ordinary attention ---------------------------------------------------------------------------------------------------


def metadata(a: SimpleNamespace) -> Tensor:
    where = "get_scheduler_metadata"
    check_index(where, "seqused_k", a.seqused_k, a.seqused_k.device, (a.batch_size,))
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, a.seqused_k.tolist())
    lengths = a.seqused_k
    if a.cu_seqlens_k_new is not None:
        lengths = lengths + a.cu_seqlens_k_new[1:] - a.cu_seqlens_k_new[:-1]
    made = Metadata.make(_facts(a, a.batch_size, a.max_seqlen_q, a.num_heads_q, a.num_heads_kv, a.headdim), lengths)
    return made.to(_current(lengths.device))


def _facts(a: SimpleNamespace, batch: int, longest: int, heads: int, kv_heads: int, width: int) -> list[Any]:
    return [batch, longest, heads, kv_heads, width, a.causal, *a.window_size, a.attention_chunk]


def with_kvcache(a: SimpleNamespace) -> Any:
    where = "flash_attn_with_kvcache"
    _unmodelled(where, a, "k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "rotary_seqlens")
    if any(c.stride(-1) != 1 for c in (a.k_cache, a.v_cache)):
        raise Refused(f"{where}: caches must be contiguous in their last dimension")
    if not isinstance(a.cache_seqlens, Tensor) or a.page_table is None or a.q.dim() != 3:
        raise NotImplementedError(f"{where}: this stand-in knows pages, packed q and lengths on the device")
    q, batch = a.q, a.page_table.shape[0]
    check_index(where, "page_table", a.page_table, q.device, (batch, None))
    check_index(where, "cache_seqlens", a.cache_seqlens, q.device, (batch,))
    if a.cu_seqlens_q is None:
        raise Refused(f"{where}: packed q needs cu_seqlens_q")
    check_index(where, "cu_seqlens_q", a.cu_seqlens_q, q.device, (batch + 1,))
    if a.max_seqlen_q is None:
        raise AssertionError
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    keys = keys_of_pages(where, a.k_cache, a.v_cache, a.page_table, a.cache_seqlens.tolist())
    if a.qv is not None and (a.qv.shape[-1], q.shape[-1]) == (512, 64):
        return _latent(where, a, edges, keys)
    if a.qv is not None:
        raise AssertionError("qv parameter is not supported yet")
    if a.learnable_sink is None and a.scheduler_metadata is not None:
        if a.scheduler_metadata.device != q.device:
            raise Misuse(f"{where}: scheduler_metadata is on {a.scheduler_metadata.device}, q on {q.device}")
        facts = _facts(a, batch, a.max_seqlen_q, q.shape[-2], a.k_cache.shape[-2], q.shape[-1])
        Metadata.check(where, a.scheduler_metadata, facts, a.cache_seqlens)
    out, lse = _attend(where, a, q, edges, keys, a.k_cache, a.v_cache)
    return (out, lse, None, None) if a.return_softmax_lse else out


def varlen(a: SimpleNamespace) -> Any:
    where = "flash_attn_varlen_func"
    _unmodelled(where, a, "seqused_q", "seqused_k", "page_table", "qv", "out", "scheduler_metadata")
    if a.cu_seqlens_q is None:
        raise Refused(f"{where}: 'NoneType' object has no attribute 'is_musa'")
    q, batch = a.q, a.cu_seqlens_q.shape[0] - 1
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        check_index(where, name, getattr(a, name), q.device, (batch + 1,))
    if a.max_seqlen_q is None or a.max_seqlen_k is None:
        raise AssertionError
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, q.shape[0])
    k_edges = packed_edges(where, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    check_longest(where, "max_seqlen_k", a.max_seqlen_k, lengths_of(k_edges))
    keys = keys_of_rows(where, a.k, a.v, k_edges)
    FACTS.require("family", a.backend, where)
    if a.backend == "auto":
        raise Misuse(f"{where}: backend='auto' picks kernels that read windows and heads differently; name one")
    if a.backend == "mubin":
        out, lse = _mubin(where, a, edges, keys)
    else:
        out, lse = _attend(where, a, q, edges, keys, a.k, a.v)
    _garble(out, lse, edges, keys)
    return (out, lse) if a.return_softmax_lse else out


def _mubin(where: str, a: SimpleNamespace, edges: Any, keys: Keys) -> tuple[Tensor, Tensor]:
    pair = (a.q.shape[-1], a.v.shape[-1])
    if pair != (192, 128) and not (pair[0] == pair[1] <= 128):
        raise Refused(f"{where}: the mubin kernels have no widths {pair}")
    if a.learnable_sink is not None or a.softcap:
        raise Misuse(f"{where}: the mubin kernels know neither sinks nor softcap")
    if a.window_size[0] >= 0 or a.window_size[1] > 0:
        raise Refused(f"{where}: the mubin kernels have no windows")
    FACTS.require_dtype("dtype", a.q, a.k, a.v)
    return forward(a.q, edges, keys, scale=_scale(a), causal=a.causal)  # a right window of 0 is not looked at


def _attend(where: str, a: SimpleNamespace, q: Tensor, edges: Any, keys: Keys, k: Tensor, v: Tensor) -> Any:
    FACTS.require_dtype("dtype", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"{where}: inputs must have the same dtype")
    if q.shape[-2] % k.shape[-2]:
        raise Refused(f"{where}: num_head must be divisible by num_head_kv")
    pair = tuple(_rounded(w) for w in (q.shape[-1], v.shape[-1]))
    FACTS.require("rounded_pair", pair, where)
    if max(q.shape[-1], v.shape[-1]) > 512:
        raise Misuse(f"{where}: widths above 512 are read up to 512")
    if any(d is not None for d in (a.q_descale, a.k_descale, a.v_descale)):
        raise Misuse(f"{where}: descales are accepted and ignored")
    if getattr(a, "deterministic", False):
        raise Misuse(f"{where}: deterministic is accepted and ignored")
    if a.learnable_sink is not None:
        FACTS.require_dtype("sinks_dtype", a.learnable_sink)
        if tuple(a.learnable_sink.shape) != (q.shape[-2],):
            raise Refused(f"{where}: learnable_sink must be (heads,)")
    return forward(
        q, edges, keys, scale=_scale(a), causal=a.causal, window=a.window_size, chunk=a.attention_chunk,
        softcap=a.softcap, sinks=a.learnable_sink,
    )  # fmt: skip


def _scale(a: SimpleNamespace) -> float:
    return a.q.shape[-1] ** -0.5 if a.softmax_scale is None else float(a.softmax_scale)


def _rounded(width: int) -> int:
    return next((w for w in FACTS.limit("rounded_width") if width <= w), 512)


def _garble(out: Tensor, lse: Tensor, edges: Any, keys: Keys) -> None:
    """Rows without keys: nothing says what is left there, so it is the worst."""
    for (begin, end), (k, _) in zip(edges, keys):
        if not k.shape[0]:
            out[begin:end], lse[:, begin:end] = float("nan"), float("inf")


def _unmodelled(where: str, a: SimpleNamespace, *names: str) -> None:
    if given := [n for n in names if getattr(a, n) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {', '.join(given)}")
    if a.cp_world_size != 1:
        raise NotImplementedError(f"{where}: this stand-in does not know context parallelism")


# latent attention -----------------------------------------------------------------------------------------------------


def _latent(where: str, a: SimpleNamespace, edges: Any, keys: Keys) -> Any:
    """Ignores windows, softcap, sinks and descales: an adapter that passes them believes they are applied."""
    ignored = {"window_size": (-1, -1), "softcap": 0.0, "learnable_sink": None, "k_descale": None, "num_splits": 0}
    if wrong := [n for n, plain in ignored.items() if getattr(a, n) != plain]:
        raise Misuse(f"{where}: the latent branch ignores {', '.join(wrong)}")
    _latent_shapes(where, a.q, a.qv, a.k_cache, a.v_cache)
    if a.scheduler_metadata is None:
        raise Refused(f"{where}: workspace must be provided")
    workspace, ready = a.scheduler_metadata
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or workspace.device != a.q.device:
        raise Refused(f"{where}: workspace must be one-dimensional uint8 on q's device")
    FACTS.require("workspace_bytes", workspace.numel(), where)
    facts = [a.page_table.shape[0], a.max_seqlen_q, a.q.shape[-2]]
    made = Metadata.make(facts, a.cache_seqlens).contiguous()
    words = workspace[: made.numel() * 4].view(torch.int32)
    if ready:
        Metadata.check(where, words, facts, a.cache_seqlens)
    else:
        words.copy_(made)
    out, lse = forward(a.q, edges, keys, scale=_latent_scale(a), causal=a.causal, qv=a.qv)
    return (out, lse) if a.return_softmax_lse else out


def _latent_shapes(where: str, q: Tensor, qv: Tensor, k: Tensor, v: Tensor) -> None:
    FACTS.require_dtype("dtype", q, qv, k, v)
    FACTS.require("mla_widths", (q.shape[-1], qv.shape[-1]), where)
    FACTS.require("mla_widths", (k.shape[-1], v.shape[-1]), where)
    FACTS.require("mla_page_size", k.shape[1], where)
    if k.shape[2] != 1 or k.stride(1) != 576 or v.stride(1) != 576:
        raise Refused(f"{where}: caches must be views of one row of 576 with one head")


def _latent_scale(a: SimpleNamespace) -> float:
    return 576**-0.5 if a.softmax_scale is None else float(a.softmax_scale)


def mla_metadata(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    where = "get_mla_metadata"
    _refuse_sparse(where, a, "topk", "extra_topk", "topk_length", "extra_topk_length")
    check_index(where, "cache_seqlens", a.cache_seqlens, a.cache_seqlens.device, (None,))
    made = Metadata.make([a.num_q_tokens_per_head_k, a.num_heads_k], a.cache_seqlens)
    place = _current(a.cache_seqlens.device)
    splits = torch.zeros(a.cache_seqlens.shape[0] + 1, dtype=torch.int32, device=place)
    return made[None].to(place), splits


def flash_mla(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    where = "flash_mla_with_kvcache"
    _refuse_sparse(where, a, "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length")
    batch, queries, heads, width = a.q.shape
    check_index(where, "block_table", a.block_table, a.q.device, (batch, None))
    check_index(where, "cache_seqlens", a.cache_seqlens, a.q.device, (batch,))
    if a.head_dim_v != 512:
        raise AssertionError
    if width != 576 or a.k_cache.shape[1:] != (64, 1, 576):
        raise Refused(f"{where}: q must have 576 columns and k_cache be (pages, 64, 1, 576)")
    FACTS.require_dtype("dtype", a.q, a.k_cache)
    if a.num_splits.shape != (batch + 1,) or a.tile_scheduler_metadata.device != a.q.device:
        raise Refused(f"{where}: num_splits must be (batch + 1,), metadata on q's device")
    Metadata.check(where, a.tile_scheduler_metadata.flatten(), [queries * heads, 1], a.cache_seqlens)
    keys = keys_of_pages(where, a.k_cache, a.k_cache[..., :512], a.block_table, a.cache_seqlens.tolist())
    edges = [(i * queries, (i + 1) * queries) for i in range(batch)]
    out, lse = forward(a.q.flatten(0, 1), edges, keys, scale=_latent_scale(a), causal=a.causal)
    return out.unflatten(0, (batch, queries)), batched(lse, batch).transpose(1, 2).contiguous()


def _refuse_sparse(where: str, a: SimpleNamespace, *names: str) -> None:
    if a.is_fp8_kvcache or (given := [n for n in names if getattr(a, n) is not None]):
        raise Refused(f"{where}: not supported here: {'fp8 caches' if a.is_fp8_kvcache else ', '.join(given)}")
