"""AITER's CK and assembly kernels over pages, and over keys in memory; gfx942 and gfx950.

Conventions: windows are (left, right) without the token itself, and ``left == 0`` is taken for no window by the ragged
router; LSE is natural log, (heads, tokens); sinks are float32 (heads,). Paged decode writes ``out``, has no LSE, and
wants a workspace in bytes. The assembly decode kernel that ignores ``scale`` (``pa_fwd_asm``) is never called.

Sources: AITER e404860 aiter/ops/mha.py, aiter/ops/attention.py; vLLM 0.33.0 rocm_aiter_fa.py (how decode is called).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Indexed, Paged, Ragged, both_sides, load, refilled
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_rocm.backends import AITER

PARTITION = 256
"""Keys that one workgroup of paged decode takes; AITER's default."""


def bind_prefill(b: Binding) -> Kernels:
    if b.sliding_window == 1:
        raise ValueError("AITER takes a window of one token, (0, 0) in its words, for no window")
    attend = load(AITER, "aiter.ops.mha", "mha_batch_prefill_func")
    step_of, page_size = attrgetter(b.role), b.page_size or 1
    scale, causal, window, softcap = b.scale, b.spec.causal, both_sides(b), b.spec.logit_softcap or 0.0

    plan = refilled(lambda capture: Indexed(page_size, capture))

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, kv_cache.k, kv_cache.v, step.cu_query, step.indptr, step.indices, step.max_query, step.max_kv,
            softmax_scale=scale, logits_soft_cap=softcap, causal=causal, window_size=window, return_lse=return_lse,
            out=out, kv_last_page_lens=step.last_page_lens, sink_ptr=sinks,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call)


class Partitioned(Paged):
    """Adds the workspace in which partial results of one step meet."""

    __slots__ = ("workspace",)

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.workspace = torch.empty(0, dtype=torch.uint8)

    def reserve(self, bytes_per_partition: int) -> None:
        """Grow the workspace to the step; a captured one has its largest size from the beginning."""
        need = self.rows * -(-self.max_kv // PARTITION) * bytes_per_partition
        if self.workspace.numel() < need or self.workspace.device != self.table.device:
            self.workspace = torch.empty(need, dtype=torch.uint8, device=self.table.device)


def bind_decode(b: Binding) -> Kernels:
    load(AITER, "aiter.ops.attention", "paged_attention_v1")  # importing it registers the operator
    attend = torch.ops.aiter.paged_attention_v1
    step_of, page_size, scale, softcap = attrgetter(b.role), b.page_size or 1, b.scale, b.spec.logit_softcap or 0.0
    width, stored = b.v_head_dim, "auto" if b.kv_dtype == b.dtype else "fp8"
    per_partition = b.num_heads * (b.v_head_dim * b.dtype.itemsize + 2 * 4)
    """One row's share of a partition: an output, and two float32 sums, per query head."""

    def plan(batch: Batch, *, capture: Capture | None = None, out: Partitioned | None = None) -> Partitioned:
        step = Partitioned(page_size, capture) if out is None else out
        step.fill(batch)
        step.reserve(per_partition)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], width)
        if q.stride(1) != width:  # rows may have gaps between them, heads are found by the width
            q = q.contiguous()
        attend(
            out, step.workspace, q, kv_cache.k, kv_cache.v, scale, step.table, step.cu_query, step.kv_lens,
            step.max_kv, None, stored, "NHD", softcap, kv_cache.k_scale_t, kv_cache.v_scale_t, None, PARTITION,
        )  # fmt: skip
        return out

    return Kernels(plan=plan, call=call)


def bind_ragged(b: Binding) -> Kernels:
    """Materialised MLA: keys in memory, 192/128."""
    attend = load(AITER, "aiter.ops.mha", "flash_attn_varlen_func")
    step_of, scale, causal = attrgetter(b.role), b.scale, b.spec.causal

    plan = refilled(lambda _: Ragged())

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, k, v, step.cu_query, step.cu_kv, step.max_query, step.max_kv,
            softmax_scale=scale, causal=causal, return_lse=return_lse, out=out,
        )  # fmt: skip
        if not return_lse:
            return got
        o: Tensor = got[0]
        lse: Tensor = got[1].T
        step.nothing_seen(o, lse)
        return o, lse

    return Kernels(plan=plan, call=call)
