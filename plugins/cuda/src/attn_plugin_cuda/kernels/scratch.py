"""A step over pages with the zeroed memory that planless kernels (trtllm-gen, XQA) work in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_core.adapters import Paged
from attn_core.runtime import Batch, Binding, Capture
from attn_plugin_cuda.memory import workspace

MOST_PROCESSORS = 256
"""More multiprocessors than any chip has: counters are sized by them."""


class Scratch(Paged):
    """Workspace and counters of one plan. The kernels leave the counters at zero after every launch."""

    __slots__ = ("counters", "cu_kv", "key_lens", "workspace")

    workspace: Tensor
    counters: Tensor
    cu_kv: Tensor
    """Cumulative key lengths, int32 ``(rows + 1,)``, on the device; for prefill."""
    key_lens: Tensor
    """Key lengths as cuDNN wants them, int32 ``(rows, 1, 1, 1)``, on the device."""


def counters(rows: int, heads: int, device: torch.device) -> Tensor:
    """Semaphores of trtllm-gen: four bytes per row and head, at least one per multiprocessor, in multiples of eight."""
    return torch.zeros(-(-max(rows * heads, MOST_PROCESSORS) // 8) * 8 * 4, dtype=torch.uint8, device=device)


def rounded(capture: Capture, tokens: int) -> Capture:
    """``capture`` with the longest context a multiple of ``tokens``."""
    return replace(capture, max_kv_len=-(-capture.max_kv_len // tokens) * tokens)


def planner(b: Binding, *, table_multiple: int = 1) -> Callable[..., Scratch]:
    """The role's ``plan``. ``table_multiple``: the block table's width must be a multiple of it."""
    page_size, device = b.page_size or 1, b.torch_device
    offsets = b.role == "prefill"

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> Scratch:
        step: Scratch = out
        if out is None:
            step = Scratch(page_size, None if capture is None else rounded(capture, table_multiple * page_size))
            step.workspace, step.counters = workspace(device).zero_(), counters(batch.num_seqs, b.num_heads, device)
        step.fill(batch)
        if capture is None and step.table.shape[1] % table_multiple:
            step.table = pad(step.table, (0, -step.table.shape[1] % table_multiple))
        if step.counters.numel() < 4 * step.rows * b.num_heads:
            step.counters = counters(step.rows, b.num_heads, device)
        if offsets:
            step.cu_kv = batch.cu_kv_lens_device
        return step

    return plan
