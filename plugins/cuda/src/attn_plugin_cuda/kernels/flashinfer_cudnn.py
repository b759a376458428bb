"""cuDNN's attention over pages through FlashInfer, on sm_100 and sm_103: no plan, lengths from the device.

Conventions: caches are (pages, heads, page, width) by their strides, so that NHD goes as a view; key lengths are
(rows, 1, 1, 1): of one axis they are read wrongly from the second row on; windows count the keys to the left. LSE is
base 2 in decode; in prefill natural, because asked for, and packed, because given a tensor of that shape. Before cuDNN
9.25 prefill finds rows of q by heads times width: they must lie closely packed (cudnn/prefill.py, _PrefillMetadata).

cuDNN builds a graph for every shape that is declared to it (55 to 70 ms on B200). So tables and longest sequences are
declared in steps: consecutive steps of a batch then share one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import left, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.backends_flashinfer import CUDNN_FRONTEND
from attn_plugin_cuda.kernels.scratch import Scratch, planner

MODULE = "flashinfer.cudnn"
LN2 = math.log(2)
KEYS = 2048
"""Longest contexts are declared in multiples of it, as FlashInfer's wrapper does."""
FEWEST = 16
"""Longest queries are declared as powers of two from here on: never 1, which is another kernel with a wrong LSE."""


def bind(b: Binding) -> Kernels:
    load(CUDNN_FRONTEND, "cudnn")  # without it FlashInfer takes binaries of its own, which do less
    return _decode(b) if b.role == "decode" else _prefill(b)


def _decode(b: Binding) -> Kernels:
    attend = load(FLASHINFER, MODULE, "cudnn_batch_decode_with_kv_cache")
    scale, window, page_size = b.scale, left(b), b.page_size or 1

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.decode
        keys, values = kv_cache.memo.get("cudnn") or heads_first(kv_cache)
        got = attend(
            q, keys, values, scale, step.workspace,
            max_sequence_kv=step.table.shape[1] * page_size, actual_seq_lens_kv=step.key_lens,
            block_tables=step.table, return_lse=return_lse, q_len_per_req=step.max_query, window_left=window,
        )  # fmt: skip
        return (got[0], got[1] * LN2) if return_lse else got

    return Kernels(plan=_planner(b), call=call)


def _prefill(b: Binding) -> Kernels:
    attend = load(FLASHINFER, MODULE, "cudnn_batch_prefill_with_kv_cache")
    scale, page_size, heads = b.scale, b.page_size or 1, b.num_heads

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = plan.prefill
        lse = q.new_empty(q.shape[0], heads, dtype=torch.float32) if return_lse else None
        offsets = step.cu_query
        keys, values = kv_cache.memo.get("cudnn") or heads_first(kv_cache)
        got = attend(
            q.contiguous(), keys, values, scale, step.workspace,
            max_token_per_sequence=_declared(step.max_query), max_sequence_kv=step.table.shape[1] * page_size,
            actual_seq_lens_kv=step.key_lens, block_tables=step.table, causal=True,
            return_lse=return_lse, batch_offsets_q=offsets, batch_offsets_stats=offsets if return_lse else None,
            batch_offsets_units="tokens", lse=lse, lse_base="ln",
        )  # fmt: skip
        return got if return_lse else got[0]

    return Kernels(plan=_planner(b), call=call)


def heads_first(kv_cache: Any) -> tuple[Tensor, Tensor]:
    """k and v as (pages, heads, page, width)."""
    made = kv_cache.memo["cudnn"] = kv_cache.k.transpose(1, 2), kv_cache.v.transpose(1, 2)
    return made


def _planner(b: Binding) -> Callable[..., Scratch]:
    fill = planner(b, table_multiple=max(1, KEYS // (b.page_size or 1)))

    def plan(batch: Batch, *, capture: Capture | None = None, out: Scratch | None = None) -> Scratch:
        step = fill(batch, capture=capture, out=out)
        step.key_lens = step.kv_lens.view(-1, 1, 1, 1)
        return step

    return plan


def _declared(longest: int) -> int:
    """``longest`` rounded up to a power of two, ``FEWEST`` at least."""
    return max(FEWEST, 1 << (longest - 1).bit_length())
