"""FlashAttention-2 (``flash_attn``).

Decode goes through ``flash_attn_with_kvcache``, which cuts long contexts into splits and lets us fix their number;
prefill through ``flash_attn_varlen_func`` over the block table. No function fills an output of the caller.

Conventions: windows are (left, right) without the token itself; causality is aligned to the bottom right; LSE is
natural log, (heads, tokens) for packed queries and (batch, heads, queries) for batched ones; slopes are float32.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Paged, Ragged, both_sides, load, refilled
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends_flash import FLASH_ATTN

MODULE = "flash_attn"


def bind(b: Binding) -> Kernels:
    if b.kv_layout is None:
        return _ragged(b)
    return _decode(b) if b.role == "decode" else _prefill(b)


def _slopes(b: Binding) -> Tensor | None:
    if b.alibi_slopes is None:
        return None
    return torch.tensor(b.alibi_slopes, dtype=torch.float32, device=b.torch_device)


def _decode(b: Binding) -> Kernels:
    attend = load(FLASH_ATTN, MODULE, "flash_attn_with_kvcache")
    scale, causal, window, slopes = b.scale, b.spec.causal, both_sides(b), _slopes(b)
    page_size, softcap, splits = b.page_size or 1, b.spec.logit_softcap or 0.0, 1 if b.options.deterministic else 0
    heads, width = b.num_heads, b.head_dim

    plan = refilled(lambda capture: Paged(page_size, capture))

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.decode
        got = attend(
            q.view(step.rows, step.max_query, heads, width), kv_cache.k, kv_cache.v,
            cache_seqlens=step.kv_lens, block_table=step.table, softmax_scale=scale, causal=causal,
            window_size=window, softcap=softcap, alibi_slopes=slopes, num_splits=splits, return_softmax_lse=return_lse,
        )  # fmt: skip
        if return_lse:
            return got[0].view(-1, heads, width), got[1].transpose(1, 2).flatten(0, 1)
        return got.view(-1, heads, width)

    return Kernels(plan=plan, call=call)


def _prefill(b: Binding) -> Kernels:
    attend = load(FLASH_ATTN, MODULE, "flash_attn_varlen_func")
    scale, causal, window, slopes = b.scale, b.spec.causal, both_sides(b), _slopes(b)
    softcap = b.spec.logit_softcap or 0.0

    def plan(batch: Batch, *, capture: Capture | None = None, out: Rows | None = None) -> Rows:
        step = Rows() if out is None else out
        step.fill(batch)
        step.table = batch.block_table
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.prefill
        got = attend(
            q, kv_cache.k, kv_cache.v, step.cu_query, step.cu_kv, step.max_query, step.max_kv,
            softmax_scale=scale, causal=causal, window_size=window, softcap=softcap, alibi_slopes=slopes,
            return_attn_probs=return_lse, block_table=step.table,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call)


class Rows(Ragged):
    """Key lengths as offsets, although the keys lie in pages."""

    __slots__ = ("table",)

    table: Tensor | None


def _ragged(b: Binding) -> Kernels:
    """Encoders: keys in memory."""
    attend = load(FLASH_ATTN, MODULE, "flash_attn_varlen_func")
    step_of, scale, window, slopes = attrgetter(b.role), b.scale, both_sides(b), _slopes(b)
    softcap = b.spec.logit_softcap or 0.0

    plan = refilled(lambda _: Ragged())

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, k, v, step.cu_query, step.cu_kv, step.max_query, step.max_kv,
            softmax_scale=scale, causal=False, window_size=window, softcap=softcap, alibi_slopes=slopes,
            return_attn_probs=return_lse,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call)
