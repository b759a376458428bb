"""vLLM's CUTLASS MLA decode, an operator of torch."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from simulators.attend import finish, seen, sequence
from simulators.contract import Contract, Misuse, Refused
from simulators.flash import check_index, keys_of_pages
from simulators.standin import StandIn

FACTS = Contract.load("vllm_cutlass_mla")


def stand_in() -> StandIn:
    return StandIn(
        "vllm_cutlass_mla",
        {
            "torch.ops._C.sm100_cutlass_mla_decode": decode,
            "torch.ops._C.sm100_cutlass_mla_get_workspace_size": workspace_size,
        },
        {"vllm._custom_ops.sm100_cutlass_mla_decode": None},
    )


def workspace_size(a: SimpleNamespace) -> int:
    if a.sm_count < 1:
        raise Misuse("sm_count below 1 asks device 0, whatever runs")
    return 4 * a.num_batches * 128 * (512 + 1) * max(1, a.sm_count // a.num_batches)


def decode(a: SimpleNamespace) -> None:
    where, batch = "sm100_cutlass_mla_decode", a.q_nope.shape[0]
    cache = a.kv_c_and_k_pe_cache
    if a.q_nope.dim() != 3 or a.q_pe.shape[:2] != a.q_nope.shape[:2] or cache.dim() != 3:
        raise Refused(f"{where}: q is (rows, heads, width) twice, the cache (pages, page, width)")
    FACTS.require_dtype("dtype", a.q_nope, a.q_pe, cache)
    if not a.q_nope.dtype == a.q_pe.dtype == cache.dtype:
        raise Refused(f"{where}: q and the cache must have one dtype")
    for what, value in (("num_heads", a.q_nope.shape[1]), ("latent", a.q_nope.shape[2]), ("rope", a.q_pe.shape[2])):
        FACTS.require(what, value, where)
    FACTS.require("page_size", cache.shape[1], where)
    check_index(where, "page_table", a.page_table, a.q_nope.device, (batch, None))
    check_index(where, "seq_lens", a.seq_lens, a.q_nope.device, (batch,))
    fp8 = a.q_nope.dtype == torch.float8_e4m3fn
    if a.out.dtype != (torch.bfloat16 if fp8 else a.q_nope.dtype) or tuple(a.out.shape) != (batch, 128, 512):
        raise Refused(f"{where}: out is {tuple(a.out.shape)} {a.out.dtype}")
    if a.lse.numel() and (a.lse.dtype != torch.float32 or tuple(a.lse.shape) != (batch, 128)):
        raise Refused(f"{where}: lse is {tuple(a.lse.shape)} {a.lse.dtype}")
    need = workspace_size(SimpleNamespace(sm_count=148, num_batches=batch))
    if a.workspace.dtype != torch.uint8 or a.workspace.numel() < need:
        raise Misuse(f"{where}: a workspace of {a.workspace.numel()} bytes overflows; {need} needed")
    q = torch.cat([a.q_nope.cpu().double(), a.q_pe.cpu().double()], -1)
    parts = []
    for i, (k, _) in enumerate(
        keys_of_pages(where, cache[:, :, None], cache[:, :, None], a.page_table, a.seq_lens.tolist())
    ):
        parts.append(sequence(q[i : i + 1], k, k[..., :512], seen(1, k.shape[0]), scale=a.scale))
    out, lse = finish(parts, a.out)
    a.out.copy_(out)
    if a.lse.numel():
        a.lse.copy_(lse.T)
