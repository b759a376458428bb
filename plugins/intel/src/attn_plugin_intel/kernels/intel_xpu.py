"""vllm-xpu-kernels' FlashAttention-2 behind the contract: pages for prefill, decode and verify rows, ragged encoders.

Its one function takes arguments that its kernels never see (soft cap, alibi slopes): the rows do not claim them. What
else it wants:

* ``max_seqlen_q`` before ``cu_seqlens_q``, so everything behind k and v goes by keyword;
* an output for paged calls: without one it writes nowhere;
* windows as keys before and after a query, its own not counted: W tokens are ``[W - 1, 0]``, for encoders
  ``[W - 1, W - 1]``;
* scales of 8-bit caches as views ``(sequences, kv heads)`` of one number, both or none;
* sinks of the model's dtype.

Its LSE is ``(heads, tokens)``: handed on as a view.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import BadInputError, MissingKernelError
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Capture

MODULE = "vllm_xpu_kernels.flash_attn_interface"


@dataclass(slots=True)
class Step:
    """One step of one role; lengths and tables are int32 on the device."""

    max_queries: int
    query_starts: Tensor
    max_keys: int
    lens: Tensor
    """Paged: keys of each sequence ``(num_seqs,)``; ragged: where each begins ``(num_seqs + 1,)``."""
    table: Tensor | None


def bind(b: Binding) -> Kernels:
    """Role ``encode``, ``prefill`` or ``decode``."""
    return _bind_encode(b) if b.role == "encode" else _bind_paged(b)


def _bind_paged(b: Binding) -> Kernels:
    kernel, step_of, scale, dtype = _kernel(), attrgetter(b.role), b.scale, b.dtype
    window = None if b.sliding_window is None else [b.sliding_window - 1, 0]
    quantised = b.kv_dtype is not None and b.kv_dtype.itemsize == 1
    descales = _descales(b.num_kv_heads)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        table = batch.block_table
        if table is None:
            raise BadInputError("intel_xpu prefills and decodes over pages only: the batch needs its block_table")
        table = table if table.stride(1) == 1 else table.contiguous()
        return _refilled(out, batch, batch.max_kv_len, batch.kv_lens_device, table)

    def attend(
        q: Tensor, k: Any, v: Any, kv_cache: KVCache, plan: Any, *,
        sinks: Tensor | None = None, indices: Any = None, bias: Any = None, out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = step_of(plan)
        out = q.new_empty(q.shape) if out is None else out
        k_descale, v_descale = descales(kv_cache, step.lens.shape[0]) if quantised else (None, None)
        got = kernel(
            q, kv_cache.k, kv_cache.v, max_seqlen_q=step.max_queries, cu_seqlens_q=step.query_starts,
            max_seqlen_k=step.max_keys, seqused_k=step.lens, softmax_scale=scale, causal=True, window_size=window,
            block_table=step.table, return_softmax_lse=return_lse, out=out, k_descale=k_descale,
            v_descale=v_descale, s_aux=sinks,
        )  # fmt: skip
        return (out, got[1].t()) if return_lse else out

    return Kernels(plan=plan, call=attend, prepare_sinks=_of_dtype(dtype) if b.spec.sinks else None)


def _bind_encode(b: Binding) -> Kernels:
    kernel, scale = _kernel(), b.scale
    window = None if b.sliding_window is None else [b.sliding_window - 1, b.sliding_window - 1]

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        return _refilled(out, batch, batch.max_kv_len, batch.cu_kv_lens_device, None)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, kv_cache: None, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = plan.encode
        out = q.new_empty(q.shape) if out is None else out
        got = kernel(
            q, k, v, max_seqlen_q=step.max_queries, cu_seqlens_q=step.query_starts, max_seqlen_k=step.max_keys,
            cu_seqlens_k=step.lens, softmax_scale=scale, causal=False, window_size=window,
            return_softmax_lse=return_lse, out=out,
        )  # fmt: skip
        return (out, got[1].t()) if return_lse else out

    return Kernels(plan=plan, call=attend)


def _kernel() -> Callable[..., Any]:
    """The package's function. Its import succeeds on any machine and says then why its kernels did not load."""
    try:
        module = importlib.import_module(MODULE)
    except Exception as e:  # drivers fail in many ways
        raise MissingKernelError(f"{MODULE} does not import: {type(e).__name__}: {e}") from e
    if not module.FA2_AVAILABLE:
        raise MissingKernelError(f"the kernels of vllm-xpu-kernels do not load: {module.FA2_UNAVAILABLE_REASON}")
    function: Callable[..., Any] = module.flash_attn_varlen_func
    return function


def _refilled(out: Step | None, batch: Batch, max_keys: int, lens: Tensor, table: Tensor | None) -> Step:
    starts, longest = batch.cu_query_lens_device, batch.max_query_len
    if out is None:
        return Step(longest, starts, max_keys, lens, table)
    out.max_queries, out.query_starts, out.max_keys, out.lens, out.table = longest, starts, max_keys, lens, table
    return out


def _descales(kv_heads: int) -> Callable[[KVCache, int], tuple[Tensor, Tensor]]:
    """Scales of a cache for so many sequences, made once per number and cache."""

    def descales(cache: KVCache, sequences: int) -> tuple[Tensor, Tensor]:
        known: dict[int, tuple[Tensor, Tensor]] = cache.memo.setdefault("intel_xpu", {})
        found = known.get(sequences)
        if found is None:
            if None in cache.scales:
                raise BadInputError("intel_xpu takes one scale for all heads of a cache, this one has scales per head")
            shape = (sequences, kv_heads)
            found = known[sequences] = cache.k_scale_t.expand(shape), cache.v_scale_t.expand(shape)
        return found

    return descales


def _of_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return half if dtype == torch.float16 else bfloat


def half(sinks: Tensor) -> Tensor:
    return sinks.half().contiguous()


def bfloat(sinks: Tensor) -> Tensor:
    return sinks.bfloat16().contiguous()
