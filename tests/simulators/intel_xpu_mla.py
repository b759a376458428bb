"""MLA of sgl-kernel-xpu: decode and prefill on a latent cache."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from simulators.attend import finish, seen, sequence
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import check_index, check_longest, keys_of_pages, lengths_of, packed_edges
from simulators.standin import StandIn

FACTS = Contract.load("intel_xpu_mla")
MODULE = "sgl_kernel.attention"


def stand_in() -> StandIn:
    return StandIn(
        "intel_xpu_mla",
        {
            f"{MODULE}.flash_mla_decode": decode,
            f"{MODULE}.flash_mla_get_workspace_size": workspace_size,
            f"{MODULE}.flash_mla_prefill": prefill,
            f"{MODULE}.flash_mla_prefill_get_workspace_size": workspace_size,
        },
    )


def workspace_size(a: SimpleNamespace) -> int:
    """Of the order of the real one: what depends on what is the point. One split needs none."""
    if a.max_seq_len < 1 or a.num_batches < 1:
        raise Refused("lengths and batches must be greater than 0")
    splits = a.num_kv_splits
    if splits < 1:
        if a.num_heads < 1:
            raise Refused("num_heads must be > 0 when num_kv_splits is auto-selected")
        FACTS.require("page_size", a.page_size, "get_workspace_size")
        splits = max(1, min(128, a.max_seq_len // 128))
    return 0 if splits == 1 else 4 * a.num_batches * a.num_heads * 514 * splits


def decode(a: SimpleNamespace) -> Tensor:
    where, rows = "flash_mla_decode", a.q_nope.shape[0]
    _check(where, a, a.seq_lens, rows)
    edges = [(i, i + 1) for i in range(rows)]
    return _attend(where, a, edges, a.seq_lens, causal=True)


def prefill(a: SimpleNamespace) -> Tensor:
    where, rows = "flash_mla_prefill", a.cu_seqlens_q.shape[0] - 1
    _check(where, a, a.seq_lens_k, rows)
    check_index(where, "cu_seqlens_q", a.cu_seqlens_q, a.q_nope.device, (rows + 1,))
    edges = packed_edges(where, "cu_seqlens_q", a.cu_seqlens_q, a.q_nope.shape[0])
    check_longest(where, "max_seqlen_q", a.max_seqlen_q, lengths_of(edges))
    out = _attend(where, a, edges, a.seq_lens_k, causal=a.causal)
    whole = torch.cat([out, out.new_full((-out.shape[0] % 256, *out.shape[1:]), float("nan"))])
    return whole[: out.shape[0]]


def _check(where: str, a: SimpleNamespace, lens: Tensor, rows: int) -> None:
    q, cache = a.q_nope, a.kv_c_and_k_pe_cache
    if q.dim() != 3 or a.q_pe.dim() != 3 or cache.dim() != 3 or a.q_pe.shape[:2] != q.shape[:2]:
        raise Refused(f"{where}: q is (tokens, heads, width) twice, the cache (pages, page, width)")
    FACTS.require_dtype("dtype", q, a.q_pe, cache)
    if not q.dtype == a.q_pe.dtype == cache.dtype:
        raise Refused(f"{where}: q and the cache must have one dtype")
    for what, value in (("latent", q.shape[2]), ("rope", a.q_pe.shape[2]), ("num_heads", q.shape[1])):
        FACTS.require(what, value, where)
    FACTS.require("page_size", cache.shape[1], where)
    if not cache.is_contiguous():
        raise Refused(f"{where}: the cache must be contiguous")
    check_index(where, "page_table", a.page_table, q.device, (rows, None))
    check_index(where, "seq_lens", lens, q.device, (rows,))
    if a.page_table.shape[1] % (128 // cache.shape[1]):
        raise Refused(f"{where}: the page table must cover whole tiles of 128 keys")
    asked = SimpleNamespace(
        max_seq_len=a.page_table.shape[1] * cache.shape[1], num_batches=rows, num_heads=q.shape[1],
        page_size=cache.shape[1], num_kv_splits=a.num_kv_splits,
    )  # fmt: skip
    need = workspace_size(asked)
    if a.workspace.dtype != torch.uint8 or a.workspace.device != q.device or a.workspace.numel() < need:
        raise Misuse(f"{where}: a workspace of {a.workspace.numel()} bytes overflows; {need} needed")


def _attend(where: str, a: SimpleNamespace, edges: list[tuple[int, int]], lens: Tensor, *, causal: bool) -> Tensor:
    q = torch.cat([a.q_nope.cpu().double(), a.q_pe.cpu().double()], -1)
    cache, parts = a.kv_c_and_k_pe_cache[:, :, None], []
    keys = keys_of_pages(where, cache, cache, a.page_table, lens.tolist())
    for (begin, end), (k, _) in zip(edges, keys):
        visible = seen(end - begin, k.shape[0], causal=causal)
        parts.append(sequence(q[begin:end], k, k[..., :512], visible, scale=a.sm_scale))
    return finish(parts, a.q_nope)[0]
