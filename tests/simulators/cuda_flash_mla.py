"""FlashMLA as sgl-flash-mla ships it: dense decode (legacy kernels) and the sparse kernels of DeepSeek V3.2.

And as vLLM does, for dense decode over fp8 caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import double, finish, seen, sequence
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import Metadata, batched, check_index, keys_of_pages
from simulators.standin import StandIn

FACTS = Contract.load("flash_mla")
VLLM_FP8 = Contract.load("vllm_flash_mla")


class FlashMLASchedMeta:
    """Empty until the first call, or filled by hand."""

    def __init__(self) -> None:
        self.have_initialized = False
        self.tile_scheduler_metadata: Tensor | None = None
        self.num_splits: Tensor | None = None


def stand_ins() -> list[StandIn]:
    return [
        StandIn(
            "flash_mla",
            {
                "flash_mla.get_mla_metadata": lambda a: (FlashMLASchedMeta(), None),
                "flash_mla.flash_mla_with_kvcache": with_kvcache,
                "flash_mla.flash_mla_sparse_fwd": sparse_fwd,
            },
        ),
        StandIn("flash_mla_planned", {"flash_mla.get_mla_decoding_metadata": decoding_metadata}),
    ]


def vllm() -> StandIn:
    module = "vllm.v1.attention.ops.flashmla"
    return StandIn(
        "vllm_flash_mla",
        {
            f"{module}.get_mla_metadata_dense_fp8": vllm_metadata,
            f"{module}.flash_mla_with_kvcache_fp8": vllm_with_kvcache,
        },
    )


def decoding_metadata(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    check_index("get_mla_decoding_metadata", "seqlens_k", a.seqlens_k, a.seqlens_k.device, (None,))
    facts = [a.num_q_tokens_per_head_k, a.h_k, a.is_fp8_kvcache, a.topk or 0, a.use_legacy]
    splits = torch.zeros(a.seqlens_k.shape[0] + 1, dtype=torch.int32, device=a.seqlens_k.device)
    return Metadata.make(facts, a.seqlens_k), splits


def _scheduled(where: str, a: SimpleNamespace, facts: list[Any], lengths: Tensor) -> None:
    meta = a.tile_scheduler_metadata
    if not isinstance(meta, FlashMLASchedMeta) or a.num_splits is not None:
        raise Refused(f"{where}: tile_scheduler_metadata must be a FlashMLASchedMeta and num_splits None")
    if meta.tile_scheduler_metadata is None:
        meta.tile_scheduler_metadata = Metadata.make(facts, lengths)
        meta.num_splits = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    if meta.num_splits is None or meta.num_splits.shape[0] != lengths.shape[0] + 1:
        raise Misuse(f"{where}: the metadata is of another batch size")
    Metadata.check(where, meta.tile_scheduler_metadata, facts, lengths)


def with_kvcache(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    where, q = "flash_mla_with_kvcache", a.q
    if q.dim() != 4 or a.k_cache.dim() != 4 or a.k_cache.shape[2] != 1 or a.head_dim_v != 512:
        raise Refused(f"{where}: q (batch, queries, heads, width), k_cache (pages, page, 1, ...), head_dim_v 512")
    FACTS.require("page_size", a.k_cache.shape[1], where)
    unknown = ("extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length", "kv_format")
    if given := [n for n in unknown if getattr(a, n) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {given}")
    return _dense(where, a) if a.indices is None else _sparse(where, a)


def _dense(where: str, a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    if not a.use_legacy:
        raise Refused(f"{where}: dense decode was removed from the current kernels; use_legacy=True")
    q = a.q
    if a.is_fp8_kvcache:
        meta = a.tile_scheduler_metadata
        if not isinstance(meta, FlashMLASchedMeta) or meta.tile_scheduler_metadata is None:
            raise Refused(f"{where}: dense fp8 decoding needs metadata before the first call")
        _scheduled(where, a, [q.shape[1] * q.shape[2], 1, True, 0, True], a.cache_seqlens)
        return _dense_fp8(FACTS, "fp8_dtype", where, a)
    if a.descale_q is not None or a.descale_k is not None:
        raise Refused(f"{where}: descale_q/descale_k apply to the dense fp8 path only")
    FACTS.require_dtype("dense_dtype", q, a.k_cache)
    FACTS.require("head_dim", q.shape[-1], where)
    if q.dtype != a.k_cache.dtype or q.shape[-1] != a.k_cache.shape[-1] or a.attn_sink is not None:
        raise Refused(f"{where}: q and the cache share dtype and width, and dense decode has no sinks")
    _scheduled(where, a, [q.shape[1] * q.shape[2], 1, False, 0, True], a.cache_seqlens)
    return _over_latents(where, a)


def _dense_fp8(facts: Contract, dtype: str, where: str, a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    facts.require_dtype(dtype, a.q, a.k_cache)
    facts.require("head_dim", a.q.shape[-1], where)
    facts.require("page_size", a.k_cache.shape[1], where)
    if a.descale_q is None or a.descale_k is None:
        raise Refused(f"{where}: descale is required when input dtype is fp8")
    for t in (a.descale_q, a.descale_k):
        facts.require("descale_shape", tuple(t.shape), where)
        if t.dtype != torch.float32 or t.device != a.q.device:
            raise Refused(f"{where}: descales are float32 and lie where q does")
    return _over_latents(where, a, float(a.descale_q.cpu()), float(a.descale_k.cpu()), torch.bfloat16)


def _over_latents(
    where: str, a: SimpleNamespace, q_scale: float = 1.0, k_scale: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    q, batch = a.q, a.q.shape[0]
    check_index(where, "block_table", a.block_table, q.device, (batch, None))
    check_index(where, "cache_seqlens", a.cache_seqlens, q.device, (batch,))
    scale = q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    lengths, parts = a.cache_seqlens.tolist(), []
    for i, (k, _) in enumerate(keys_of_pages(where, a.k_cache, a.k_cache, a.block_table, lengths)):
        k, visible = double(k) * k_scale, seen(q.shape[1], k.shape[0], causal=a.causal)
        parts.append(sequence(q[i], k, k[..., : a.head_dim_v], visible, scale=scale * q_scale))
    out, lse = finish(parts, q, dtype)
    lse = lse.masked_fill(lse == -float("inf"), float("inf"))
    return out.unflatten(0, q.shape[:2]), batched(lse, batch)


def vllm_metadata(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    lengths = a.cache_seqlens
    check_index("get_mla_metadata_dense_fp8", "cache_seqlens", lengths, lengths.device, (None,))
    splits = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    return Metadata.make([a.num_q_tokens_per_head_k, a.num_heads_k], lengths), splits


def vllm_with_kvcache(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    where, q = "flash_mla_with_kvcache_fp8", a.q
    if q.dim() != 4 or a.k_cache.dim() != 4 or a.k_cache.shape[2] != 1 or a.head_dim_v != 512:
        raise Refused(f"{where}: q (batch, queries, heads, width), k_cache (pages, page, 1, width), head_dim_v 512")
    check_index(where, "num_splits", a.num_splits, q.device, (q.shape[0] + 1,))
    Metadata.check(where, a.tile_scheduler_metadata, [q.shape[1] * q.shape[2], 1], a.cache_seqlens)
    return _dense_fp8(VLLM_FP8, "dtype", where, a)


def dequantised(rows: Tensor) -> Tensor:
    """656-byte rows as float64 ``(..., 576)``: 512 fp8 values in four blocks with a float32 scale each, 64 bfloat16."""
    values = rows[..., :512].view(torch.float8_e4m3fn).double().unflatten(-1, (4, 128))
    scales = rows[..., 512:528].contiguous().view(torch.float32).double()
    rope = rows[..., 528:].contiguous().view(torch.bfloat16).double()
    return torch.cat([(values * scales[..., None]).flatten(-2), rope], -1)


def _attend(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int, sinks: Tensor | None) -> Any:
    """One token: ``q`` (heads, width), ``kv`` (rows, width) as numbers, ``indices`` (topk,); sinks scale the output."""
    chosen = indices[indices >= 0].long().cpu()
    if len(chosen) and int(chosen.max()) >= kv.shape[0]:
        raise Misuse("an index beyond the cache reads elsewhere")
    k = kv[chosen][:, None]
    o, lse = sequence(q[None], k, k[..., :d_v], seen(1, k.shape[0]), scale=scale)
    if sinks is not None:
        o = o * torch.sigmoid(lse - sinks.cpu().double()[:, None]).T[..., None]
    return o, lse.masked_fill(lse == -float("inf"), float("inf"))


def _sparse(where: str, a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    q, (batch, queries) = a.q, a.q.shape[:2]
    if a.causal or a.is_fp8_kvcache is False:
        raise Refused(f"{where}: sparse decode is not causal and reads fp8 caches")
    if not a.use_legacy:
        raise Refused(f"{where}: the current kernels read other cache formats; use_legacy=True for 656 bytes")
    FACTS.require("sparse_heads", q.shape[2], where)
    if q.dtype != torch.bfloat16 or q.shape[-1] != 576:
        raise Refused(f"{where}: q must be bfloat16 and 576 wide")
    FACTS.require("v32_bytes", a.k_cache.shape[-1] * a.k_cache.element_size(), where)
    check_index(where, "indices", a.indices, q.device, (batch, queries, None))
    FACTS.require("sparse_topk", a.indices.shape[-1], where)
    lengths = torch.zeros(batch, dtype=torch.int32, device=q.device)  # sparse scheduling does not look at lengths
    _scheduled(where, a, [queries * q.shape[2], 1, True, a.indices.shape[-1], True], lengths)
    rows = dequantised(a.k_cache.cpu().view(torch.uint8).flatten(0, 2)).bfloat16().double()  # what it multiplies
    scale = q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    flat, chosen = q.flatten(0, 1).cpu(), a.indices.flatten(0, 1)
    parts = [_attend(flat[i], rows, chosen[i], scale, a.head_dim_v, a.attn_sink) for i in range(batch * queries)]
    out, lse = finish(parts, q)
    return out.unflatten(0, (batch, queries)), batched(lse, batch)


def sparse_fwd(a: SimpleNamespace) -> Any:
    where, q = "flash_mla_sparse_fwd", a.q
    if a.topk_length is not None:
        raise NotImplementedError(f"{where}: this stand-in knows no topk_length")
    FACTS.require("sparse_head_dim", q.shape[-1], where)
    FACTS.require("sparse_heads", q.shape[1], where)
    if not a.use_legacy and q.shape[-1] != 512:
        raise Refused(f"{where}: the current kernels are 512 wide; use_legacy=True for 576")
    if q.dtype != torch.bfloat16 or a.kv.dtype != torch.bfloat16 or a.kv.dim() != 3 or a.kv.shape[1] != 1:
        raise Refused(f"{where}: q and kv (rows, 1, width) must be bfloat16")
    check_index(where, "indices", a.indices, q.device, (q.shape[0], 1, None))
    FACTS.require("sparse_topk", a.indices.shape[-1], where)
    kv, chosen = a.kv.cpu().double()[:, 0], a.indices[:, 0]
    parts = [_attend(q[i].cpu(), kv, chosen[i], a.sm_scale, a.d_v, a.attn_sink) for i in range(q.shape[0])]
    out, lse = finish(parts, q)
    if a.return_log2_lse is False:
        return out, None, None
    return out, lse.T.contiguous(), lse.T.contiguous()
