"""DeepSeek's sparse attention on FlashMLA's sparse kernels (legacy ones of sgl-flash-mla), over two kinds of cache.

A bfloat16 latent cache (layout MLA) goes to ``flash_mla_sparse_fwd`` as rows. The fp8 cache (layout DSA_FP8, 656 bytes
a token, see :mod:`attn_plugin_cuda.kernels.dsa_rows`) goes to ``flash_mla_with_kvcache`` as it is (``flashmla_kv``), or
its rows of this step are made bfloat16 first and go to ``flash_mla_sparse_fwd`` (``flashmla_sparse``): the plan takes
the second where a step has few keys for its queries, and never in a captured graph.

Conventions: indices are key positions of the token's own sequence, -1 for none; the kernels want rows of the cache, or
of what was gathered. Keys that a token may not see yet are dropped here: sparse kernels know no causality. LSE is
natural log, +inf where a token has no keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends_mla import FLASH_MLA
from attn_plugin_cuda.kernels import dsa_rows

MODULE = "flash_mla"
KEYS_PER_QUERY = 512
"""With fewer keys than this for each query of a step, reading every row once beats reading topk rows per query."""


def bind(b: Binding) -> Kernels:
    if b.role == "kv_write":
        return dsa_rows.writer(b)
    return _fp8(b) if b.kv_layout == "DSA_FP8" else _rows(b)


class Step:
    """Where each query token's keys lie, and the kernel chosen for the step."""

    __slots__ = ("capture", "first", "gathered", "last", "run", "schedule", "table")

    table: Tensor
    """int32 ``(tokens, max pages)``: the block table of each token's sequence."""
    last: Tensor
    """int32 ``(tokens, 1)``: the last key a token may see, its own."""
    run: Callable[..., Any]
    schedule: Any
    gathered: Tensor
    """flashmla_sparse: cache rows of all keys of the step, int64 ``(keys,)``."""
    first: Tensor
    """flashmla_sparse: where a token's sequence begins among them, int32 ``(tokens, 1)``."""

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture

    def fill(self, batch: Batch, page_size: int) -> Tensor:
        """Returns the row of each token, int64 ``(tokens,)``."""
        table, queries, device = batch.block_table, batch.query_lens_device, batch.device
        if table is None:
            raise ValueError("a kernel over pages was planned with a batch that has no block_table")
        rows = torch.arange(batch.num_seqs, device=device)
        row = torch.repeat_interleave(rows, queries.long(), output_size=batch.num_tokens)
        place = torch.arange(batch.num_tokens, device=device) - batch.cu_query_lens_device[row]
        last = ((batch.kv_lens_device - queries)[row] + place).int()[:, None]
        self._keep(table[row], last, page_size)
        return row

    def _keep(self, table: Tensor, last: Tensor, page_size: int) -> None:
        if self.capture is None:
            self.table, self.last = table, last
            return
        if not hasattr(self, "table"):
            width = -(-self.capture.max_kv_len // page_size)
            self.table, self.last = table.new_zeros(table.shape[0], width), last.clone()
        width = min(self.table.shape[1], table.shape[1])
        self.table[:, :width].copy_(table[:, :width])
        self.last.copy_(last)

    def slots(self, indices: Tensor, page_size: int) -> Tensor:
        """``indices`` ``(tokens, topk)`` as rows of the cache, int32; -1 where there is no key to see."""
        page = self.table.gather(1, (indices.clamp(min=0) // page_size).long())
        return self._seen(indices, page * page_size + indices % page_size)

    def places(self, indices: Tensor) -> Tensor:
        """``indices`` as rows of what was gathered."""
        return self._seen(indices, self.first + indices)

    def _seen(self, indices: Tensor, rows: Tensor) -> Tensor:
        return torch.where((indices >= 0) & (indices <= self.last), rows, -1).int()


def _rows(b: Binding) -> Kernels:
    """Over a bfloat16 latent cache."""
    sparse = load(FLASH_MLA, MODULE, "flash_mla_sparse_fwd")
    step_of, page_size, scale, latent = attrgetter(b.role), b.page_size or 1, b.scale, b.v_head_dim

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(capture) if out is None else out
        step.fill(batch, page_size)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        rows = kv_cache.data[0].flatten(0, 1).unsqueeze(1)
        chosen = step_of(plan).slots(indices, page_size).unsqueeze(1)
        o, _, lse = sparse(q, rows, chosen, scale, d_v=latent, use_legacy=True)
        return (o, blind(lse)) if return_lse else o

    return Kernels(plan=plan, call=call)


def _fp8(b: Binding) -> Kernels:
    """Over the 656-byte rows, by the kernel that the plan chose."""
    sparse, direct, empty = load(
        FLASH_MLA, MODULE, "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"
    )
    step_of, page_size, scale, latent = attrgetter(b.role), b.page_size or 1, b.scale, b.v_head_dim

    def flashmla_kv(q: Tensor, kv_cache: Any, step: Step, indices: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = direct(
            q.unsqueeze(1), kv_cache.data[0].unsqueeze(2), None, None, latent, step.schedule, softmax_scale=scale,
            causal=False, is_fp8_kvcache=True, indices=step.slots(indices, page_size).unsqueeze(1), use_legacy=True,
        )  # fmt: skip
        return o.squeeze(1), lse.squeeze(2)

    def flashmla_sparse(q: Tensor, kv_cache: Any, step: Step, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = dsa_rows.decode(kv_cache.data[0].flatten(0, 1)[step.gathered], q.dtype)
        o, _, lse = sparse(q, rows.unsqueeze(1), step.places(indices).unsqueeze(1), scale, d_v=latent, use_legacy=True)
        return o, lse

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(capture) if out is None else out
        row = step.fill(batch, page_size)
        if capture is None and sum(batch.lengths.keys) < KEYS_PER_QUERY * batch.num_tokens:
            step.run, step.gathered = flashmla_sparse, batch.token_indices(page_size)
            step.first = batch.cu_kv_lens_device[row][:, None]
        else:
            step.run, step.schedule = flashmla_kv, empty()[0]
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        o, lse = step.run(q, kv_cache, step, indices)
        return (o, blind(lse)) if return_lse else o

    return Kernels(plan=plan, call=call)


def blind(lse: Tensor) -> Tensor:
    """-inf instead of +inf where a token has no keys."""
    return lse.masked_fill(lse == math.inf, -math.inf)
