"""FlashInfer: what there is, the MLA wrapper (fa2, fa3), and the planless calls of trtllm-gen, XQA and cute-dsl.

Beside it: the paged and ragged wrappers (``_wrappers``), what they may be planned for (``_planned``), variants compiled
for them (``_variants``), cuDNN (``_cudnn``), and fmha_v2 (``cuda_fmha_v2``).
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import by_shape, finish, put, seen, sequence
from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS, FP8, base2, check_workspace, host_ints, nhd
from simulators.cuda_flashinfer_cudnn import cudnn_decode, cudnn_prefill
from simulators.cuda_flashinfer_variants import SINK_SOURCES
from simulators.cuda_flashinfer_wrappers import Paged, Ragged, WithSinks
from simulators.cuda_fmha_v2 import fmha_v2
from simulators.flash import check_index, check_longest, keys_of_pages, keys_of_rows, lengths_of, packed_edges
from simulators.standin import StandIn


def stand_in(arch: str = "sm_90") -> StandIn:
    """``arch``: what FlashInfer compiles for, where kernels differ by it."""
    return StandIn(
        "flashinfer",
        {
            "flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper": Paged,
            "flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper": Ragged,
            "flashinfer.mla.BatchMLAPagedAttentionWrapper": Latent,
            "flashinfer.mla.MLAPlanMetadata.csr": lambda a: a,
            "flashinfer.decode.trtllm_batch_decode_with_kv_cache": trtllm_decode,
            "flashinfer.decode.xqa_batch_decode_with_kv_cache": xqa_decode,
            "flashinfer.prefill.trtllm_batch_context_with_kv_cache": trtllm_context,
            "flashinfer.prefill.trtllm_ragged_attention_deepseek": ragged_deepseek,
            "flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla": trtllm_mla,
            "flashinfer.utils.get_trtllm_gen_multi_ctas_kv_counter_bytes": counter_bytes,
            "flashinfer.attention.BatchAttentionWithAttentionSinkWrapper": WithSinks,
            "flashinfer.prefill.trtllm_fmha_v2_prefill": fmha_v2(arch),
            "flashinfer.cudnn.cudnn_batch_prefill_with_kv_cache": cudnn_prefill,
            "flashinfer.cudnn.cudnn_batch_decode_with_kv_cache": cudnn_decode,
        },
        {"flashinfer.jit.attention.variants.attention_sink_decl": SINK_SOURCES, "cudnn.__version__": "1.31.0"},
    )


class Latent:
    """BatchMLAPagedAttentionWrapper over CSR metadata: fa2 and fa3."""

    def __init__(self, a: SimpleNamespace) -> None:
        self.where = "BatchMLAPagedAttentionWrapper"
        if a.backend not in ("fa2", "fa3"):
            raise NotImplementedError(f"{self.where}: this stand-in knows fa2 and fa3, not {a.backend}")
        self.backend, self.workspace, self.graph, self.buffers = (
            a.backend,
            a.float_workspace_buffer,
            a.use_cuda_graph,
            a,
        )
        if a.use_cuda_graph and any(
            getattr(a, n) is None for n in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
        ):
            raise Refused(f"{self.where}: use_cuda_graph needs the CSR buffers")

    def plan(self, a: SimpleNamespace) -> None:
        m = a.metadata
        if m is None:
            raise Misuse(f"{self.where}.plan: flat metadata is deprecated and changes the defaults")
        offsets = host_ints(self.where, "qo_indptr", m.qo_indptr, (None,))
        pages = host_ints(self.where, "kv_indptr", m.kv_indptr, (len(offsets),))
        self.lengths = host_ints(self.where, "kv_len_arr", m.kv_len_arr, (len(offsets) - 1,))
        check_index(self.where, "kv_indices", m.kv_indices, self.workspace.device, (pages[-1],))
        required = ("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size", "causal", "sm_scale", "q_data_type")
        if missing := [n for n in (*required, "kv_data_type") if getattr(a, n) is None]:
            raise TypeError(f"plan() missing {missing}")
        if a.head_dim_ckv % 128 or a.head_dim_kpe % 64:
            raise Refused(f"{self.where}: latent width % 128 and rotary width % 64")
        fp8 = a.kv_data_type == torch.float8_e4m3fn
        if not fp8 and a.kv_data_type != a.q_data_type:
            raise Refused(f"{self.where}: the cache has q's dtype or is fp8_e4m3")
        if fp8 and (a.q_data_type != torch.bfloat16 or a.head_dim_ckv != 512 or a.scale_mode != "kv-per-tensor"):
            raise Refused(f"{self.where}: an fp8 cache goes with bfloat16, latent 512 and scale_mode kv-per-tensor")
        if a.kv_cache_layout not in (None, "packed"):
            raise NotImplementedError("this stand-in knows packed caches")
        if a.lse_mode not in ("none", "base2", "basee"):
            raise Refused(f"{self.where}: lse_mode {a.lse_mode!r}")
        self.edges, self.pages = list(itertools.pairwise(offsets)), list(itertools.pairwise(pages))
        self.indices, self.planned, self.fp8 = m.kv_indices, a, fp8
        if self.graph:
            if pages[-1] > self.buffers.kv_indices.shape[0] or len(offsets) != self.buffers.qo_indptr.shape[0]:
                raise Refused(f"{self.where}: a captured wrapper keeps its batch size, and the pages fit its buffer")
            self.buffers.kv_indices[: pages[-1]].copy_(m.kv_indices)
            self.indices = self.buffers.kv_indices

    def run(self, a: SimpleNamespace) -> Any:
        p = self.planned
        asked = "none" if not a.return_lse else "basee" if a.return_lse_base_on_e else "base2"
        if asked != p.lse_mode:
            raise Refused(f"run: LSE mode {asked} was planned as {p.lse_mode}")
        if a.query is None or a.kv_cache is None:
            raise Misuse("run: separate q and cache tensors are deprecated; pass query= and kv_cache=")
        if isinstance(a.query, tuple) != ((p.query_layout or "packed") == "split"):
            raise Refused(f"run: query does not have the planned layout {p.query_layout!r}")
        q = torch.cat([t.cpu() for t in a.query], -1) if isinstance(a.query, tuple) else a.query.cpu()
        like = a.query[0] if isinstance(a.query, tuple) else a.query
        widths = p.head_dim_ckv, p.head_dim_kpe
        if (q.dtype, a.kv_cache.dtype) != (p.q_data_type, p.kv_data_type):
            raise Refused("run: other dtypes than planned")
        if tuple(q.shape) != (self.edges[-1][1], p.num_heads, sum(widths)) or a.kv_cache.dim() != 3:
            raise Refused(f"run: query is {tuple(q.shape)}, the cache {tuple(a.kv_cache.shape)}")
        if a.kv_cache.shape[1:] != (p.page_size, sum(widths)):
            raise Misuse(f"run: a cache of {tuple(a.kv_cache.shape)} was planned with pages of {p.page_size}")
        if self.fp8 == (a.ckv_scale is None) or self.fp8 == (a.kpe_scale is None):
            raise Refused("run: ckv_scale and kpe_scale go with an fp8 cache, and only with one")
        scales = torch.ones(sum(widths), dtype=torch.float64)
        if self.fp8:
            scales[: widths[0]], scales[widths[0] :] = a.ckv_scale, a.kpe_scale
        parts = []
        for (b, e), (pb, pe), n in zip(self.edges, self.pages, self.lengths):
            rows = keys_of_pages("run", a.kv_cache, a.kv_cache, self.indices[pb:pe][None], [n])[0][0]
            k = (rows.cpu().double() * scales)[:, None]
            visible = seen(e - b, n, causal=p.causal)
            parts.append(sequence(q[b:e], k, k[..., : widths[0]], visible, scale=p.sm_scale))
        out, lse = finish(parts, like)
        out = put(a.out, out)
        if not a.return_lse:
            return out
        return out, lse.T.contiguous() if a.return_lse_base_on_e else base2(lse)


# Without a plan -------------------------------------------------------------------------------------------------------


def counter_bytes(a: SimpleNamespace) -> int:
    return -(-max(a.batch_size * a.num_qo_heads, a.sm_count) // 8) * 8 * 4


def _workspace(where: str, a: SimpleNamespace, device: torch.device) -> None:
    check_workspace(where, a.workspace_buffer, device)
    if bool(a.workspace_buffer.cpu()[: 1 << 20].any()):
        raise Misuse(f"{where}: the workspace was not zeroed before its first use")


def _counter(where: str, a: SimpleNamespace, batch: int, heads: int) -> None:
    c = a.multi_ctas_kv_counter_buffer
    if c is None:
        raise Misuse(f"{where}: allocates and zeroes a counter in every call")
    if c.numel() * c.element_size() < -(-batch * heads // 8) * 32 or bool(c.cpu().any()):
        raise Misuse(f"{where}: the counter buffer is too small or was not zeroed")


def _keys(where: str, a: SimpleNamespace, query: Tensor, layout: str, batch: int) -> Any:
    """k, v in NHD and one list of keys per sequence, over a block table."""
    cache = a.kv_cache if isinstance(a.kv_cache, tuple) else a.kv_cache.unbind(1)
    k_cache, v_cache = (nhd(t, layout) for t in cache)
    check_index(where, "block_tables", a.block_tables, query.device, (batch, None))
    check_index(where, "seq_lens", a.seq_lens, query.device, (batch,))
    return k_cache, v_cache, keys_of_pages(where, k_cache, v_cache, a.block_tables, a.seq_lens.tolist())


def _trtllm_dtypes(where: str, q: Tensor, k: Tensor) -> None:
    pairs = [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float8_e4m3fn)]
    if (q.dtype, k.dtype) not in [*pairs, (torch.float8_e4m3fn,) * 2]:
        raise Refused(f"{where}: no kernel for q {q.dtype} over {k.dtype}")


def _finish(a: SimpleNamespace, where: str, query: Tensor, edges: Any, keys: Any, causal: bool = True) -> Any:
    sinks = a.sinks
    if sinks is not None and (sinks.dtype != torch.float32 or tuple(sinks.shape) != (query.shape[1],)):
        raise Refused(f"{where}: sinks must be float32 (heads,)")
    for name in ("bmm1_scale", "bmm2_scale"):
        if isinstance(getattr(a, name), Tensor):
            raise NotImplementedError("this stand-in takes scales as numbers")
    parts = []
    for (b, e), (k, v) in zip(edges, keys):
        visible = seen(e - b, k.shape[0], causal=causal, left=a.window_left)
        o, lse = sequence(query[b:e], k, v, visible, scale=a.bmm1_scale, sinks=sinks)
        parts.append((o * a.bmm2_scale, lse))
    out, lse = finish(parts, query, torch.bfloat16 if query.dtype in FP8 else None)
    by_shape(where, out=a.out)
    return put(a.out, out), lse


def trtllm_decode(a: SimpleNamespace) -> Any:
    where, q, width = "trtllm_batch_decode_with_kv_cache", a.query, a.q_len_per_req
    if a.backend == "auto":
        raise Misuse(f"{where}: backend='auto' leaves the kernel to rules that nobody recorded")
    if a.backend != "trtllm-gen" or a.cum_seq_lens_q is not None or a.mask is not None:
        raise NotImplementedError(f"{where}: this stand-in knows backend='trtllm-gen' with q_len_per_req")
    batch = q.shape[0] // width
    if batch * width != q.shape[0]:
        raise Refused(f"{where}: {q.shape[0]} rows are no multiple of q_len_per_req={width}")
    k_cache, _, keys = _keys(where, a, q, a.kv_layout, batch)
    _trtllm_dtypes(where, q, k_cache)
    FACTS.require("trtllm_page_size", k_cache.shape[1], where)
    FACTS.require("trtllm_head_dim", q.shape[-1], where)
    _workspace(where, a, q.device)
    _counter(where, a, batch, q.shape[1])
    check_longest(where, "max_seq_len", a.max_seq_len, a.seq_lens.tolist())
    out, lse = _finish(a, where, q, [(i * width, (i + 1) * width) for i in range(batch)], keys)
    return (out, base2(lse)) if a.return_lse else out


def trtllm_context(a: SimpleNamespace) -> Any:
    where, q, batch = "trtllm_batch_context_with_kv_cache", a.query, a.batch_size
    if a.backend != "trtllm-gen" or (not a.causal and a.window_left >= 0):
        raise Refused(f"{where}: backend {a.backend!r}, causal={a.causal} with window_left={a.window_left}")
    k_cache, _, keys = _keys(where, a, q, a.kv_layout, batch)
    _trtllm_dtypes(where, q, k_cache)
    FACTS.require("trtllm_page_size", k_cache.shape[1], where)
    FACTS.require("trtllm_head_dim", q.shape[-1], where)
    _workspace(where, a, q.device)
    _counter(where, a, batch, q.shape[1])
    for name in ("cum_seq_lens_q", "cum_seq_lens_kv"):
        check_index(where, name, getattr(a, name), q.device, (batch + 1,))
    edges = packed_edges(where, "cum_seq_lens_q", a.cum_seq_lens_q, q.shape[0])
    if (a.cum_seq_lens_kv[1:] - a.cum_seq_lens_kv[:-1]).tolist() != a.seq_lens.tolist():
        raise Misuse(f"{where}: cum_seq_lens_kv and seq_lens disagree")
    check_longest(where, "max_q_len", a.max_q_len, lengths_of(edges))
    check_longest(where, "max_kv_len", a.max_kv_len, a.seq_lens.tolist())
    out, lse = _finish(a, where, q, edges, keys, a.causal)
    return (out, base2(lse)) if a.return_lse else out


def xqa_decode(a: SimpleNamespace) -> Any:
    where, q = "xqa_batch_decode_with_kv_cache", a.query
    if a.q_len_per_req != 1 or a.mask is not None or a.o_scale != 1.0 or a.kv_cache_sf is not None:
        raise NotImplementedError(f"{where}: this stand-in decodes one token per row")
    k_cache, _, keys = _keys(where, a, q, a.kv_layout, q.shape[0])
    by_shape(where, query=q)
    FACTS.require("xqa_page_size", k_cache.shape[1], where)
    FACTS.require("xqa_head_dim", q.shape[-1], where)
    FACTS.require_dtype("dtype", q)
    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise Refused(f"{where}: the cache is in q's dtype or fp8_e4m3, not {k_cache.dtype}")
    _workspace(where, a, q.device)
    check_longest(where, "max_seq_len", a.max_seq_len, a.seq_lens.tolist())
    return _finish(a, where, q, [(i, i + 1) for i in range(q.shape[0])], keys)[0]


def ragged_deepseek(a: SimpleNamespace) -> Any:
    where, q, batch = "trtllm_ragged_attention_deepseek", a.query, a.batch_size
    FACTS.require("ragged_deepseek_head_dims", (q.shape[-1], a.value.shape[-1]), where)
    FACTS.require_dtype("dtype", q, a.key, a.value)
    if a.backend not in ("trtllm-gen", "cute-dsl"):
        raise Refused(f"{where}: backend {a.backend!r}")
    _workspace(where, a, q.device)
    for name in ("cum_seq_lens_q", "cum_seq_lens_kv"):
        check_index(where, name, getattr(a, name), q.device, (batch + 1,))
    check_index(where, "seq_lens", a.seq_lens, q.device, (batch,))
    edges = packed_edges(where, "cum_seq_lens_q", a.cum_seq_lens_q, q.shape[0])
    k_edges = packed_edges(where, "cum_seq_lens_kv", a.cum_seq_lens_kv, a.key.shape[0])
    if lengths_of(k_edges) != a.seq_lens.tolist():
        raise Misuse(f"{where}: cum_seq_lens_kv and seq_lens disagree")
    check_longest(where, "max_q_len", a.max_q_len, lengths_of(edges))
    check_longest(where, "max_kv_len", a.max_kv_len, lengths_of(k_edges))
    mirrors = (a.q_seq_lens_cpu, a.kv_seq_lens_cpu)
    if (mirrors[0] is None) != (mirrors[1] is None):
        raise Refused(f"{where}: the length mirrors go together")
    if mirrors[0] is None and 0 in lengths_of(k_edges):
        raise Misuse(f"{where}: a row without keys and no length mirrors: undefined")
    for given, real in zip(mirrors, (edges, k_edges)):
        if given is not None and (given.device.type != "cpu" or given.tolist() != lengths_of(real)):
            raise Refused(f"{where}: a length mirror lies elsewhere or disagrees")
    b = SimpleNamespace(**vars(a), sinks=a.attention_sinks)
    out, lse = _finish(b, where, q, edges, keys_of_rows(where, a.key, a.value, k_edges), a.is_causal)
    return (out, base2(lse)) if a.return_lse else out


def trtllm_mla(a: SimpleNamespace) -> Any:
    where, q = "trtllm_batch_decode_with_kv_cache_mla", a.query
    if a.backend == "auto":
        raise Misuse(f"{where}: backend='auto' leaves the kernel to rules that nobody recorded")
    if a.backend not in ("trtllm-gen", "cute-dsl") or a.sparse_mla_top_k or a.cum_seq_lens_q is not None:
        raise NotImplementedError(f"{where}: this stand-in knows dense decode by a named backend")
    if a.backend == "cute-dsl" and a.cute_dsl_impl == "modular" and a.return_lse:
        raise Refused(f"{where}: the modular cute-dsl kernel returns no LSE")
    if a.backend == "cute-dsl" and a.cute_dsl_impl != "monolithic":
        raise NotImplementedError(f"{where}: this stand-in knows the monolithic cute-dsl kernel")
    if q.dim() != 4:
        raise Refused(f"{where}: query must be (batch, queries, heads, width)")
    batch, width = q.shape[:2]
    FACTS.require("mla_nope_dim", a.qk_nope_head_dim, where)
    if q.shape[-1] != a.kv_lora_rank + a.qk_rope_head_dim or a.kv_cache.shape[-1] != q.shape[-1]:
        raise Refused(f"{where}: query and cache are {q.shape[-1]} and {a.kv_cache.shape[-1]} wide")
    cache = a.kv_cache if a.kv_cache.dim() == 3 else a.kv_cache.squeeze(1)
    FACTS.require("mla_page_size_trtllm", cache.shape[1], where)
    if q.dtype != cache.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        raise Refused(f"{where}: query and cache must have one dtype, got {q.dtype} and {cache.dtype}")
    if a.backend == "trtllm-gen" and (q.dtype == torch.float16 or 64 < q.shape[2] < 128):
        raise Refused(f"{where}: trtllm-gen takes bfloat16 or fp8, and not between 64 and 128 heads")
    check_index(where, "block_tables", a.block_tables, q.device, (batch, None))
    check_index(where, "seq_lens", a.seq_lens, q.device, (batch,))
    if a.backend == "cute-dsl" and a.block_tables.shape[1] % (128 // cache.shape[1]):
        raise Refused(f"{where}: the block table must be a multiple of {128 // cache.shape[1]} wide")
    _workspace(where, a, q.device)
    if a.backend == "trtllm-gen":
        _counter(where, a, batch, q.shape[2])
    check_longest(where, "max_seq_len", a.max_seq_len, a.seq_lens.tolist())
    parts = []
    for i, (k, _) in enumerate(keys_of_pages(where, cache, cache, a.block_tables, a.seq_lens.tolist())):
        k = k.cpu().double()[:, None]
        o, lse = sequence(
            q[i], k, k[..., : a.kv_lora_rank], seen(width, k.shape[0], causal=True), scale=a.bmm1_scale, sinks=a.sinks
        )
        parts.append((o * a.bmm2_scale, lse))
    out, lse = finish(parts, q, torch.bfloat16 if q.dtype in FP8 else None)
    by_shape(where, out=a.out)
    out = put(a.out, out.unflatten(0, (batch, width)))
    if not a.return_lse:
        return out
    natural = a.backend == "cute-dsl"
    return out, lse.T.contiguous().unflatten(0, (batch, width)) if natural else base2(lse)
