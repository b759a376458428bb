"""MLA on the sm_100 family through FlashInfer: trtllm-gen (``trtllm_mla``) and monolithic CuTe-DSL (``cutedsl_mla``).

Decode runs on the latent cache; prefill of form ``materialised`` on expanded keys in memory, by trtllm-gen for both.

Conventions: queries and outputs are (batch, queries, heads, width); the scores' scale is ours to pass, with the cache's
scale in it, and that scale again for the output, since values are latents; an fp8 cache wants q in fp8 and answers in
bfloat16; LSE is base 2 from trtllm-gen and natural from CuTe-DSL; workspace and counters start as zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Ragged, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.kernels.scratch import planner
from attn_plugin_cuda.memory import workspace

LN2 = math.log(2)


def bind(b: Binding) -> Kernels:
    return bind_ragged(b) if b.form == "materialised" else _decode(b, "trtllm-gen")


def bind_cutedsl(b: Binding) -> Kernels:
    return bind_ragged(b) if b.form == "materialised" else _decode(b, "cute-dsl")


def _decode(b: Binding, path: str) -> Kernels:
    attend = load(FLASHINFER, "flashinfer.mla", "trtllm_batch_decode_with_kv_cache_mla")
    page_size, scale, latent, fp8 = b.page_size or 1, b.scale, b.v_head_dim, b.kv_dtype != b.dtype
    rope, nope, limit = b.head_dim - latent, b.spec.nope_dim, torch.finfo(torch.float8_e4m3fn).max
    heads, width = b.num_heads, b.head_dim
    own: dict[str, Any] = {"cute_dsl_impl": "monolithic"} if path == "cute-dsl" else {}

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, stored = plan.decode, kv_cache.k_scale
        if fp8:
            q = q.clamp(-limit, limit).to(torch.float8_e4m3fn)
        rows, queries = step.rows, step.max_query
        got = attend(
            q.view(rows, queries, heads, width), kv_cache.data[0], step.workspace, nope, latent, rope, step.table,
            step.kv_lens, step.max_kv, out=None if out is None else out.view(rows, queries, heads, latent),
            bmm1_scale=scale * stored, bmm2_scale=stored, backend=path, return_lse=return_lse,
            multi_ctas_kv_counter_buffer=step.counters, **own,
        )  # fmt: skip
        o = (got[0] if return_lse else got).view(-1, heads, latent) if out is None else out
        return (o, got[1].reshape(o.shape[:2])) if return_lse else o

    return Kernels(plan=planner(b, table_multiple=128 // page_size), call=call)


class Rows(Ragged):
    """Expanded keys in memory, with the memory trtllm-gen works in."""

    __slots__ = ("kv_lens", "mirrors", "rows", "workspace")

    rows: int
    kv_lens: Tensor
    mirrors: tuple[Tensor, Tensor] | tuple[None, None]
    """Query and key lengths on the host, where a row has no keys: the kernel must not see such rows."""

    def __init__(self, device: torch.device) -> None:
        self.workspace = workspace(device).zero_()


def bind_ragged(b: Binding) -> Kernels:
    """Materialised prefill."""
    attend = load(FLASHINFER, "flashinfer.prefill", "trtllm_ragged_attention_deepseek")
    scale, causal, device = b.scale, b.spec.causal, b.torch_device

    def plan(batch: Batch, *, capture: Capture | None = None, out: Rows | None = None) -> Rows:
        step = Rows(device) if out is None else out
        step.fill(batch)
        step.rows, step.kv_lens = batch.num_seqs, batch.kv_lens_device
        step.mirrors = (None, None) if step.blind is None else (batch.query_lens, batch.kv_lens)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.prefill
        got = attend(
            q, k, v, step.workspace, step.kv_lens, step.max_query, step.max_kv, scale, 1.0, 1.0, step.rows, -1,
            step.cu_query, step.cu_kv, None, causal, return_lse, out=out, backend="trtllm-gen",
            q_seq_lens_cpu=step.mirrors[0], kv_seq_lens_cpu=step.mirrors[1],
        )  # fmt: skip
        return (got[0], got[1] * LN2) if return_lse else got

    return Kernels(plan=plan, call=call)
