"""FlashMLA's dense decode on Hopper, from sgl-flash-mla's legacy kernels.

The schedule depends on the lengths, so it is worked out in every plan and lies on it, at fixed addresses where a graph
was captured. Left to itself the first layer of a step would fill it, and a captured graph could keep one of the past.

Conventions: queries and outputs are (batch, queries, heads, width), the cache (pages, 64, 1, 576); causality must be
asked for; LSE is natural log, (batch, heads, queries), and always returned.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_core.adapters import Paged, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends_mla import FLASH_MLA

MODULE = "flash_mla"


class Step(Paged):
    """Pages and lengths, with the schedule made for them."""

    __slots__ = ("schedule",)

    def __init__(self, page_size: int, capture: Capture | None, schedule: Any) -> None:
        super().__init__(page_size, capture)
        self.schedule = schedule

    def take(self, tiles: Tensor, splits: Tensor) -> None:
        if self.capture is None or self.schedule.tile_scheduler_metadata is None:
            self.schedule.tile_scheduler_metadata, self.schedule.num_splits = tiles, splits
        else:
            self.schedule.tile_scheduler_metadata.copy_(tiles)
            self.schedule.num_splits.copy_(splits)


def bind(b: Binding) -> Kernels:
    attend, empty, get_metadata = load(
        FLASH_MLA, MODULE, "flash_mla_with_kvcache", "get_mla_metadata", "get_mla_decoding_metadata"
    )
    page_size, scale, latent, heads = b.page_size or 1, b.scale, b.v_head_dim, b.num_heads
    width = b.head_dim

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = Step(page_size, capture, empty()[0]) if out is None else out
        step.fill(batch)
        step.take(*get_metadata(step.kv_lens, step.max_query * heads, 1, use_legacy=True))
        return step

    def four_axes(kv_cache: Any) -> Tensor:
        made: Tensor = kv_cache.data[0].unsqueeze(2)
        kv_cache.memo["flashmla"] = made
        return made

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, rows = plan.decode, kv_cache.memo.get("flashmla")
        o, lse = attend(
            q.view(step.rows, step.max_query, heads, width), four_axes(kv_cache) if rows is None else rows, step.table,
            step.kv_lens, latent, step.schedule, softmax_scale=scale, causal=True, is_fp8_kvcache=False,
            use_legacy=True,
        )  # fmt: skip
        o = o.view(-1, heads, latent)
        return (o, lse.transpose(1, 2).flatten(0, 1)) if return_lse else o

    return Kernels(plan=plan, call=call)
