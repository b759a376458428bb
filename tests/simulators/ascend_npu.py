"""torch_npu 2.10: fused infer attention (both versions, packed queries), its cache writer, and all parts together.

ATB's kernels are in ``ascend_atb``, graphs and streams in ``ascend_graphs``.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators import ascend_atb
from simulators.ascend_graphs import World
from simulators.attend import finish, seen, sequence
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import Keys, keys_of_pages, keys_of_rows
from simulators.standin import StandIn

FACTS = Contract.load("torch_npu", "torch_npu_runtime")
V1 = "torch.ops.npu.npu_fused_infer_attention_score"
V2 = f"{V1}_v2"
SCATTER = "torch.ops.npu.npu_scatter_pa_kv_cache"
ALL = 2147483647
NOT_MODELLED = ("pse_shift", "quant_scale1", "quant_scale2", "antiquant_scale", "key_antiquant_scale",
                "key_shared_prefix", "query_padding_size", "kv_padding_size", "dequant_scale_query",
                "dequant_scale_key", "quant_scale_out")  # fmt: skip


class Npu(StandIn):
    """``world`` holds the streams and graphs. ``nnal=False``: ATB's library is not installed."""

    def __init__(self, home: str = "cpu", *, nnal: bool = True) -> None:
        self.world = World(home)
        npu, atb, kernel = "torch.ops.npu", "torch.ops.atb", self.world.kernel
        kernel_atb = kernel if nnal else no_nnal
        super().__init__(FACTS, {
            V1: kernel(v1), V2: kernel(v2), f"{V1}.out": kernel(into(v1)), f"{V2}.out": kernel(into(v2)),
            SCATTER: kernel(scatter, writes=True),
            f"{npu}._npu_fused_infer_attention_score_get_max_workspace": room,
            f"{npu}._npu_fused_infer_attention_score_v2_get_max_workspace": room,
            "torch_npu.op_plugin.atb._atb_ops._register_atb_extensions": (lambda a: None) if nnal else no_nnal(),
            f"{atb}._npu_paged_attention": kernel_atb(ascend_atb.paged_attention),
            f"{atb}._npu_paged_attention_splitfuse_v2": kernel_atb(ascend_atb.splitfuse),
            f"{atb}._npu_reshape_and_cache": kernel_atb(ascend_atb.reshape_and_cache, writes=True),
            f"{npu}.empty_with_format": ascend_atb.empty_with_format,
            f"{npu}.get_npu_format": ascend_atb.get_npu_format,
            **self.world.answers(),
        })  # fmt: skip


def stand_in(home: str = "cpu", *, nnal: bool = True) -> Npu:
    return Npu(home, nnal=nnal)


def no_nnal(*_: Any, **__: Any) -> Any:
    def missing(a: SimpleNamespace) -> None:
        raise OSError("Please check that the nnal package is installed.")

    return missing


def into(answer: Any) -> Any:
    """The overload that fills tensors of the caller."""

    def fill(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
        out, lse = answer(SimpleNamespace(**{n: x for n, x in vars(a).items() if n not in ("out", "workspace")}))
        given, given_lse = a.out
        if a.workspace is not None and a.workspace.numel() < size_of(a):
            raise Misuse(f"out: a workspace of {a.workspace.numel()} bytes, where {size_of(a)} are used")
        if given.shape != out.shape or given.dtype != out.dtype or not given.is_contiguous():
            raise Refused(f"out: output {tuple(given.shape)} {given.dtype}, expected {tuple(out.shape)} {out.dtype}")
        given.copy_(out)
        if lse.dim() > 1:
            if given_lse.shape != lse.shape or given_lse.dtype != lse.dtype:
                raise Refused(f"out: LSE {tuple(given_lse.shape)} {given_lse.dtype}, expected {tuple(lse.shape)}")
            given_lse.copy_(lse)
        return given, given_lse

    return fill


def size_of(a: SimpleNamespace) -> int:
    """Bytes of workspace, which is the vendor's to know: more for longer keys, so one step's is not every step's."""
    lengths = a.actual_seq_kvlen if hasattr(a, "actual_seq_kvlen") else a.actual_seq_lengths_kv
    return int(a.query.shape[1] * len(lengths) * max(lengths))


def room(a: SimpleNamespace) -> Tensor:
    return a.query.new_empty(size_of(a), dtype=torch.uint8)  # type: ignore[no-any-return]


def v1(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return attend("npu_fused_infer_attention_score", SimpleNamespace(
        **vars(a), query_lens=a.actual_seq_lengths, key_lens=a.actual_seq_lengths_kv, heads=a.num_heads,
        factor=a.scale, lse=a.softmax_lse_flag, sinks=None,
    ))  # fmt: skip


def v2(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return attend("npu_fused_infer_attention_score_v2", SimpleNamespace(
        **vars(a), query_lens=a.actual_seq_qlen, key_lens=a.actual_seq_kvlen, heads=a.num_query_heads,
        factor=a.softmax_scale, lse=a.return_softmax_lse, sinks=a.learnable_sink,
    ))  # fmt: skip


def attend(where: str, a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    if given := [n for n in NOT_MODELLED if getattr(a, n, None) is not None]:
        raise NotImplementedError(f"{where}: this stand-in does not know {', '.join(given)}")
    FACTS.require("layout", a.input_layout, where)
    FACTS.require("sparse_mode", a.sparse_mode, where)
    tensors = [t for t in (a.query, a.key, a.value, a.query_rope, a.key_rope, a.block_table, a.atten_mask)
               if t is not None]  # fmt: skip
    if len({t.device for t in tensors}) != 1:
        raise Refused(f"{where}: tensors on several devices: {sorted({str(t.device) for t in tensors})}")
    if any(not t.is_contiguous() for t in tensors):
        raise Misuse(f"{where}: an input is not contiguous; its strides are not looked at")
    FACTS.require_dtype("dtype", a.query, a.key, a.value)
    heads, kv_heads = a.query.shape[1], a.num_key_value_heads or a.heads
    if a.heads != heads:
        raise Refused(f"{where}: the number of heads is {a.heads}, q has {heads}")
    if heads % kv_heads:
        raise Refused(f"{where}: {heads} heads over {kv_heads}")
    FACTS.require("heads", heads, where)
    FACTS.require("group", heads // kv_heads, where)
    edges = _edges(where, "query lengths", a.query_lens, a.query.shape[0])
    FACTS.require("batch", len(edges), where)
    keys = _paged(where, a, kv_heads, len(edges)) if a.block_table is not None else _ragged(where, a, len(edges))
    q = a.query
    if a.query_rope is not None:
        q = _latent(where, a, kv_heads)
    else:
        pair = (q.shape[-1], keys[0][1].shape[-1])
        if keys[0][0].shape[-1] != q.shape[-1]:
            raise Refused(f"{where}: q has width {q.shape[-1]}, k {keys[0][0].shape[-1]}")
        FACTS.require("tnd_pair", pair, where)
    if a.sinks is not None:
        FACTS.require_dtype("sinks_dtype", a.sinks)
        if tuple(a.sinks.shape) != (heads,):
            raise Refused(f"{where}: learnable_sink must be (heads,)")
    if a.sparse_mode != 0:
        _check_mask(where, a.sparse_mode, a.atten_mask)
    parts = []
    for (begin, end), (k, v) in zip(edges, keys):
        visible = _visible(where, a, end - begin, k.shape[0])
        parts.append(sequence(q[begin:end], k, v, visible, scale=a.factor, sinks=a.sinks))
    out, lse = finish(parts, a.query)
    lse = lse.T.contiguous().unsqueeze(-1)
    for (begin, end), (k, _) in zip(edges, keys):
        if not k.shape[0]:  # what is left in rows without keys is not stated
            out[begin:end], lse[begin:end] = float("nan"), float("inf")
    return out, lse if a.lse else lse.new_zeros(1)


def _lengths(where: str, name: str, given: Any) -> list[int]:
    if isinstance(given, Tensor):
        raise Misuse(f"{where}: {name} are a tensor: reading it waits for the device")
    if not isinstance(given, list) or not all(type(n) is int for n in given):
        raise Refused(f"{where}: {name} must be a list of ints, got {type(given).__name__}")
    return given


def _edges(where: str, name: str, given: Any, rows: int) -> list[tuple[int, int]]:
    ends = _lengths(where, name, given)
    edges = list(pairwise([0, *ends]))
    if ends[-1] != rows or any(b > e for b, e in edges):
        raise Misuse(f"{where}: {name} {ends} do not cut {rows} rows: they are cumulative, without the leading 0")
    return edges


def _paged(where: str, a: SimpleNamespace, kv_heads: int, batch: int) -> Keys:
    FACTS.require("page_size", a.block_size, where)
    lengths = _lengths(where, "key lengths", a.key_lens)
    if a.block_table.dtype != torch.int32 or len(lengths) != batch or a.block_table.shape[0] != batch:
        raise Refused(f"{where}: error 561002: {len(lengths)} key lengths, a table of {tuple(a.block_table.shape)}")
    caches = []
    for t in (a.key, a.value):
        if t.dim() == 4:  # (pages, heads, page, width)
            t = t.transpose(1, 2)
        elif t.dim() == 3:
            t = t.unflatten(2, (kv_heads, -1))
        else:
            raise Refused(f"{where}: a paged cache has three or four dimensions")
        if t.shape[1] != a.block_size or t.shape[2] != kv_heads:
            raise Misuse(f"{where}: cache {tuple(t.shape)} beside block_size {a.block_size} and {kv_heads} heads")
        caches.append(t)
    k, v = caches
    if a.key_rope is not None:
        k = torch.cat((k, a.key_rope.unflatten(2, (kv_heads, -1))), -1)
    return keys_of_pages(where, k, v, a.block_table, lengths)


def _ragged(where: str, a: SimpleNamespace, batch: int) -> Keys:
    edges = _edges(where, "key lengths", a.key_lens, a.key.shape[0])
    if len(edges) != batch:
        raise Refused(f"{where}: error 561002: {len(edges)} key lengths for {batch} rows")
    return keys_of_rows(where, a.key, a.value, edges)


def _latent(where: str, a: SimpleNamespace, kv_heads: int) -> Tensor:
    FACTS.require("mla_widths", (a.query.shape[-1], a.query_rope.shape[-1]), where)
    FACTS.require("mla_heads", a.heads, where)
    if kv_heads != 1:
        raise Refused(f"{where}: one key head with a latent width of 512")
    if a.lse:
        raise Refused(f"{where}: LSE is not supported with a latent width of 512")
    if a.key.data_ptr() != a.value.data_ptr():
        raise Misuse(f"{where}: key and value are the latent cache, both")
    return torch.cat((a.query, a.query_rope), -1)


def _visible(where: str, a: SimpleNamespace, queries: int, keys: int) -> Tensor:
    if a.sparse_mode == 0:
        if a.atten_mask is not None:
            raise NotImplementedError(f"{where}: this stand-in knows mode 0 without a mask")
        return seen(queries, keys)
    if a.sparse_mode == 3:
        return seen(queries, keys, causal=True)
    return seen(queries, keys, left=-1 if a.pre_tokens == ALL else a.pre_tokens, right=a.next_tokens)


def _check_mask(where: str, mode: int, mask: Tensor | None) -> None:
    if mask is None:
        raise Refused(f"{where}: sparse_mode {mode} wants a mask")
    FACTS.require("mask_shape", tuple(mask.shape), where)
    FACTS.require_dtype("mask_dtype", mask)
    if not torch.equal(mask.cpu().to(torch.int8), _above(mask.shape[0])):
        raise Misuse(f"{where}: the mask must be 1 above the diagonal, where nothing is seen")


@cache
def _above(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.int8).triu_(1)


def scatter(a: SimpleNamespace) -> None:
    where = "npu_scatter_pa_kv_cache"
    if any(x is not None for x in (a.compress_lens, a.compress_seq_offsets, a.seq_lens)):
        raise NotImplementedError(f"{where}: this stand-in knows no compression")
    FACTS.require("cache_mode", a.cache_mode, where)
    FACTS.require_dtype("slots_dtype", a.slot_mapping)
    if a.cache_mode == "PA_NZ":
        raise Misuse(f"{where}: cache_mode PA_NZ would write a plain cache as a fractal one")
    if any(not t.is_contiguous() for t in (a.key, a.value, a.key_cache, a.value_cache)):
        raise Misuse(f"{where}: an input is not contiguous")
    slots = a.slot_mapping.cpu().long()
    if bool((slots < 0).any()):
        raise Misuse(f"{where}: a slot below 0: nothing says what happens")
    for new, pages in ((a.key, a.key_cache), (a.value, a.value_cache)):
        if new.shape[1:] != pages.shape[2:] or new.dtype != pages.dtype:
            raise Refused(f"{where}: keys {tuple(new.shape)} do not fit a cache of {tuple(pages.shape)}")
        ascend_atb.one_key_a_slot(where, slots, new)
        page, place = (x.to(pages.device) for x in (slots // pages.shape[1], slots % pages.shape[1]))
        pages[page, place] = new
