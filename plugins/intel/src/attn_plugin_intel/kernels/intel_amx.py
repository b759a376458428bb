"""SGLang's CPU kernels (``torch.ops.sgl_kernel.decode_attention_cpu``, ``extend_attention_cpu``) behind the contract.

Their argument list has changed at least three times, so calls are built from the registered schema. They know tokens,
not pages: with pages of one token the block table is their ``req_to_token``. What else they want:

* int64 ``seq_lens``; a contiguous table; an output without gaps; sinks in the dtype of q, which is bfloat16;
* a float32 workspace per decode row, head and stretch of keys, kept on the plan;
* ``extend``: the new tokens' keys and values as they are, the rest from the cache. Absorbed MLA takes them from the
  cache, where a row holds both parts;
* older ``decode`` operators insist on writing the newest key: they get what is there already.

A window of W counts the token itself, 0 means none. ``extend`` takes a soft cap and ignores it: the rows do not claim
one for prefill.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import BadInputError, MissingKernelError
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.pages import key_slots
from attn_core.runtime.plan import Capture
from attn_plugin_intel.kernels.by_schema import Arguments

SPLITS = 8
"""Stretches a decode row's keys are cut into."""
ALIASES = MappingProxyType(
    {
        "q_extend": "query", "k_extend": "key", "v_extend": "value", "o_extend": "output",
        "k_cache": "k_buffer", "v_cache": "v_buffer", "v_cahce": "v_buffer",
        "key_scale": "k_scale", "value_scale": "v_scale",
    }
)  # fmt: skip
"""Schema's name -> ours, over all versions seen; one has a slip of the pen."""
_STEP = frozenset({"req_to_token", "req_pool_indices", "seq_lens"})
_CALL = frozenset({"query", "k_buffer", "v_buffer", "output", "sinks"})


@dataclass(slots=True)
class Step:
    """One step of one role."""

    args: list[Any]
    """The operator's arguments; those of a call are still to be set."""
    new: Tensor
    """int64: cache row of the newest keys, in token order; empty where nothing asks for them."""
    logits: Tensor | None
    """Decode: float32 ``(rows, heads, SPLITS, v_head_dim + 1)``, perhaps of more rows than this step has."""


def bind(b: Binding) -> Kernels:
    """Role ``decode`` or ``prefill``, MHA or absorbed MLA."""
    return _bind_decode(b) if b.role == "decode" else _bind_prefill(b)


def _bind_decode(b: Binding) -> Kernels:
    arguments = _arguments(b, "decode_attention_cpu", frozenset({"loc", "attn_logits"}), {"key": None, "value": None})
    rewrites = "key" not in arguments.optional
    sides, dtype = _sides(b), b.dtype
    q_at, k_at, v_at, out_at = arguments.places("query", "k_buffer", "v_buffer", "output")
    sinks_at, (key_at, value_at) = arguments.at.get("sinks"), arguments.places("key", "value")
    shape = (b.num_heads, SPLITS, b.v_head_dim + 1)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        rows = batch.num_seqs
        logits = None if out is None else out.logits
        if logits is None or logits.shape[0] < rows:
            logits = torch.empty(rows, *shape)
        values = _step_values(batch)
        new = _newest(batch) if rewrites else torch.empty(0, dtype=torch.int64)
        return _refilled(out, arguments.filled({**values, "loc": new, "attn_logits": logits[:rows]}), new, logits)

    def attend(
        q: Tensor, k: Any, v: Any, kv_cache: KVCache, plan: Any, *,
        sinks: Tensor | None = None, indices: Any = None, bias: Any = None, out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        if q.dtype is not dtype or return_lse:
            raise _refusal(q, dtype)
        step: Step = plan.decode
        keys, values = sides(kv_cache)
        args = step.args.copy()
        out = q.new_empty(*q.shape[:2], values.shape[-1]) if out is None else out
        args[q_at], args[k_at], args[v_at], args[out_at] = q, keys, values, out
        if sinks_at is not None:
            args[sinks_at] = sinks
        if rewrites:
            args[key_at] = newest = keys.index_select(0, step.new)
            args[value_at] = newest[..., : values.shape[-1]] if b.form else values.index_select(0, step.new)
        arguments.call(*args)
        return out

    return Kernels(plan=plan, call=attend, prepare_sinks=prepare_sinks)


def _bind_prefill(b: Binding) -> Kernels:
    per_step = frozenset({"key", "value", "extend_seq_lens", "extend_start_loc", "max_len_extend"})
    arguments = _arguments(b, "extend_attention_cpu", per_step, {"is_causal": True, "tree_mask": None})
    sides, dtype, absorbed = _sides(b), b.dtype, b.form == "absorbed"
    q_at, k_at, v_at, out_at = arguments.places("query", "k_buffer", "v_buffer", "output")
    sinks_at, (key_at, value_at) = arguments.at.get("sinks"), arguments.places("key", "value")

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        values = {
            **_step_values(batch),
            "extend_seq_lens": batch.query_lens_device,
            "extend_start_loc": batch.cu_query_lens_device[:-1],
            "max_len_extend": batch.max_query_len,
        }
        reads = absorbed or batch.slot_mapping is None or b.spec.kv_from is not None
        new = _newest(batch) if reads else torch.empty(0, dtype=torch.int64)
        return _refilled(out, arguments.filled(values), new, None)

    def attend(
        q: Tensor, k: Any, v: Any, kv_cache: KVCache, plan: Any, *,
        sinks: Tensor | None = None, indices: Any = None, bias: Any = None, out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        if q.dtype is not dtype or return_lse:
            raise _refusal(q, dtype)
        step: Step = plan.prefill
        keys, values = sides(kv_cache)
        args = step.args.copy()
        out = q.new_empty(*q.shape[:2], values.shape[-1]) if out is None else out
        args[q_at], args[k_at], args[v_at], args[out_at] = q, keys, values, out
        if sinks_at is not None:
            args[sinks_at] = sinks
        if absorbed:
            k = keys.index_select(0, step.new)
            v = k[..., : values.shape[-1]]
        elif k is None:
            k, v = keys.index_select(0, step.new), values.index_select(0, step.new)
        args[key_at], args[value_at] = k, v
        arguments.call(*args)
        return out

    return Kernels(plan=plan, call=attend, prepare_sinks=prepare_sinks)


def _arguments(b: Binding, name: str, more: frozenset[str], constants: dict[str, Any]) -> Arguments:
    """Everything about the operator that is known at bind. Raises :class:`MissingKernelError`."""
    window, softcap = b.sliding_window, b.spec.logit_softcap
    needed = {
        "sinks": b.spec.sinks and "sinks",
        "sliding_window_size": window is not None and f"sliding_window={window}",
        "logit_cap": softcap is not None and f"logit_softcap={softcap}",
    }
    return Arguments(
        _operator(name),
        aliases=ALIASES,
        constants={
            "sm_scale": b.scale,
            "logit_cap": softcap or 0.0,
            "sliding_window_size": window or 0,
            "is_cross_attn": False,
            "encoder_lens": None,
            "k_scale": 1.0,
            "v_scale": 1.0,
            **constants,
        },
        varying=_STEP | _CALL | more,
        needed={name: what for name, what in needed.items() if isinstance(what, str)},
    )


def _operator(name: str) -> Any:
    """The operator, after importing the package that registers it."""
    if not hasattr(torch.ops.sgl_kernel, name):
        try:
            importlib.import_module("sgl_kernel")
        except Exception as e:  # its other builds raise what they like
            raise MissingKernelError(f"sgl_kernel does not import: {type(e).__name__}: {e}") from e
    op = getattr(torch.ops.sgl_kernel, name, None)
    if op is None:
        raise MissingKernelError(f"the installed sgl_kernel has no {name}: it is not the build for CPUs")
    return op


def _sides(b: Binding) -> Callable[[KVCache], tuple[Tensor, Tensor]]:
    """Keys and values of a cache with pages of one token, ``(tokens, kv heads, width)``; absorbed MLA: a row and its
    first part, at one address, which is how the operator knows it."""
    latent = b.v_head_dim
    absorbed = b.form == "absorbed"

    def sides(cache: KVCache) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] | None = cache.memo.get("intel_amx")
        if found is None:
            row = cache.data[0] if absorbed else cache.k[:, 0]
            found = cache.memo["intel_amx"] = (row, row[..., :latent]) if absorbed else (row, cache.v[:, 0])
        return found

    return sides


def _step_values(batch: Batch) -> dict[str, Any]:
    table = batch.block_table
    if table is None:
        raise BadInputError("intel_amx attends over a cache: the batch needs its block_table")
    return {
        "req_to_token": table.contiguous(),
        "req_pool_indices": torch.arange(batch.num_seqs),
        "seq_lens": batch.kv_lens_device.long(),
    }


def _newest(batch: Batch) -> Tensor:
    """Cache rows of the step's new tokens, int64 ``(tokens,)``."""
    if batch.block_table is None:
        raise BadInputError("intel_amx attends over a cache: the batch needs its block_table")
    starts = batch.kv_lens_device - batch.query_lens_device
    return key_slots(
        batch.block_table, batch.cu_query_lens_device, batch.query_lens_device, batch.num_tokens, 1, starts
    )


def _refilled(out: Step | None, args: list[Any], new: Tensor, logits: Tensor | None) -> Step:
    if out is None:
        return Step(args, new, logits)
    out.args, out.new, out.logits = args, new, logits
    return out


def prepare_sinks(sinks: Tensor) -> Tensor:
    """The operators read them as numbers of q's dtype."""
    return sinks.bfloat16().contiguous()


def _refusal(q: Tensor, dtype: torch.dtype) -> BadInputError:
    if q.dtype is not dtype:
        return BadInputError(f"intel_amx: q is {q.dtype}, bound for {dtype}")
    return BadInputError("intel_amx returns no LSE; resolve with lse=True and another backend is chosen")
