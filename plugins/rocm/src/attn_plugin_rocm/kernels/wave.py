"""SGLang's wave kernels: decode over token indices; extend over cached keys by index and new keys in memory.

Conventions: both fill an output and return nothing; no LSE. Decode is given a scale and drops it: it always uses
``width ** -0.5``. Extend takes the scale; its indices list only the keys before the new ones, and the new ones are read
back from the cache here, because a group that shares another's cache has no k and v of its own.

The launcher takes the current device's stream. It copies inputs that are not contiguous and frees the copies before the
launch, and an output that is not contiguous is never filled: all that goes in here is contiguous. Keys beyond the first
2 GiB of a cache would be read as zeros: such a cache is refused.

Sources: SGLang 0.5.23 wave_ops/decode_attention.py, wave_ops/extend_attention.py; wave-lang 3.9.1 kernel/wave:
templates/paged_decode_attention.py, templates/extend_attention.py, utils/run_utils.py, codegen/read_write.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Indexed, load
from attn_core.errors import BadInputError
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_core.runtime.pages import key_slots
from attn_plugin_rocm.backends import WAVE

OPS = "sglang.srt.layers.attention.wave_ops"
SPLITS = 8
"""Parts that a row's keys are divided into in decode: what SGLang's own test of the kernel takes."""
MOST_BYTES = 2**31
"""Of one layer's k or v, exclusive: offsets in a buffer are signed 32-bit numbers."""


def on(device: torch.device) -> Any:
    """Makes contexts in which ``device`` is the current one."""
    return nullcontext if device.type == "cpu" else partial(torch.cuda.device, device)


def tokens(kv_cache: Any) -> tuple[Tensor, Tensor]:
    """k and v as ``(tokens, kv heads, width)``."""
    k, v = kv_cache.data
    if k.nbytes >= MOST_BYTES:
        raise BadInputError(
            f"wave reads keys up to {MOST_BYTES} bytes into a layer's cache; this one has {k.nbytes} bytes of them: "
            "make it smaller, or use another backend"
        )
    if not (k.is_contiguous() and v.is_contiguous()):
        raise BadInputError(
            f"wave reads a cache that lies closely packed; this one has strides {k.stride()} and {v.stride()}"
        )
    made = kv_cache.memo["rocm.wave"] = (k.flatten(0, 1), v.flatten(0, 1))
    return made


class Split(Indexed):
    """Adds what decode's two phases hand over."""

    __slots__ = ("maxima", "parts", "splits")

    parts: Tensor
    """float32 ``(SPLITS, rows, heads, width)``, and ``maxima`` without the width."""
    maxima: Tensor
    splits: Tensor
    """int32 ``(rows,)``."""

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.parts = torch.empty(0)

    def reserve(self, parts: tuple[int, ...], maxima: tuple[int, ...]) -> None:
        """Kept while the shape stays: always, in a captured plan."""
        device = self.indptr.device
        if self.parts.shape != parts or self.parts.device != device:
            self.parts = torch.empty(parts, dtype=torch.float32, device=device)
            self.maxima = torch.empty(maxima, dtype=torch.float32, device=device)
            self.splits = torch.full((self.rows,), SPLITS, dtype=torch.int32, device=device)


def bind_decode(b: Binding) -> Kernels:
    attend, shapes = load(
        WAVE[1], f"{OPS}.decode_attention", "decode_attention_fwd", "decode_attention_intermediate_arrays_shapes"
    )
    step_of, page_size, on_device = attrgetter(b.role), b.page_size or 1, on(b.torch_device)
    scale, softcap, heads, width = b.scale, b.spec.logit_softcap or 0.0, b.num_heads, b.v_head_dim

    def plan(batch: Batch, *, capture: Capture | None = None, out: Split | None = None) -> Split:
        step = Split(page_size, capture) if out is None else out
        step.fill(batch)
        step.reserve(*shapes(step.rows, width, heads, SPLITS))
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        keys, values = kv_cache.memo.get("rocm.wave") or tokens(kv_cache)
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        with on_device():
            attend(
                q, keys, values, out, step.indptr, step.indices, step.parts, step.maxima, step.splits, SPLITS,
                scale, softcap,
            )  # fmt: skip
        return out

    return Kernels(plan=plan, call=call)


class Extended:
    """The keys of each row that were there before, and the new ones. Refers to the batch's tensors."""

    __slots__ = ("before", "cu_before", "cu_query", "max_query", "new")

    cu_query: Tensor
    """Cumulative query lengths, int32 ``(rows + 1,)``, on the device, as all that follows."""
    cu_before: Tensor
    """The same of the keys before the new ones."""
    before: Tensor
    """Cache rows of those keys, int32."""
    new: Tensor
    """Cache rows of the new keys, int64."""
    max_query: int

    def fill(self, batch: Batch, table: Tensor, page_size: int) -> None:
        self.cu_query, self.max_query = batch.cu_query_lens_device, batch.max_query_len
        self.cu_before = batch.cu_kv_lens_device - self.cu_query
        lens = batch.kv_lens_device - batch.query_lens_device
        total = int((batch.kv_lens - batch.query_lens).sum())
        self.before = key_slots(table, self.cu_before, lens, total, page_size).int()
        self.new = key_slots(table, self.cu_query, batch.query_lens_device, batch.num_tokens, page_size, starts=lens)


def bind_extend(b: Binding) -> Kernels:
    attend = load(WAVE[1], f"{OPS}.extend_attention", "extend_attention_wave")
    step_of, page_size, on_device = attrgetter(b.role), b.page_size or 1, on(b.torch_device)
    scale, softcap = b.scale, b.spec.logit_softcap or 0.0

    def plan(batch: Batch, *, capture: Capture | None = None, out: Extended | None = None) -> Extended:
        if batch.block_table is None:
            raise ValueError("a kernel over pages was planned with a batch that has no block_table")
        step = Extended() if out is None else out
        step.fill(batch, batch.block_table, page_size)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        keys, values = kv_cache.memo.get("rocm.wave") or tokens(kv_cache)
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        with on_device():
            attend(
                q, keys[step.new], values[step.new], keys, values, step.cu_query, step.cu_before, step.before,
                None, None, step.max_query, out, is_causal=True, layer_scaling=scale, logit_cap=softcap,
            )  # fmt: skip
        return out

    return Kernels(plan=plan, call=call)
