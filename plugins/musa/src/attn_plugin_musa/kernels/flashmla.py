"""Absorbed MLA decode by FlashMLA's names (``mate.flashmla``), for MP31. Its import needs tilelang.

Conventions: q ``(rows, queries, heads, 576)``; results always ``(out, lse)``, LSE natural log ``(rows, queries,
heads)`` whatever its docstring says (MATE v0.2.2 mate/flashmla.py allocates it so, and its test expects it).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor

from attn_core.adapters import Paged, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_musa.backends import TILELANG
from attn_plugin_musa.kernels.current import current

MODULE = "mate.flashmla"


class Tiled(Paged):
    """Adds how the kernel divides this step: made anew each step, kept in place for graphs."""

    __slots__ = ("splits", "tiles")

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.tiles: Tensor | None = None
        self.splits: Tensor | None = None

    def divide(self, tiles: Tensor, splits: Tensor) -> None:
        if self.capture is None or self.tiles is None or self.splits is None:
            self.tiles, self.splits = tiles, splits
        else:
            self.tiles.copy_(tiles)
            self.splits.copy_(splits)


def bind(b: Binding) -> Kernels:
    attend, get_metadata = load(TILELANG, MODULE, "flash_mla_with_kvcache", "get_mla_metadata")
    step_of, page_size, on_device = attrgetter(b.role), b.page_size or 1, current(b.torch_device)
    scale, latent, heads, width = b.scale, b.v_head_dim, b.num_heads, b.head_dim

    def plan(batch: Batch, *, capture: Capture | None = None, out: Tiled | None = None) -> Tiled:
        step = Tiled(page_size, capture) if out is None else out
        step.fill(batch)
        with on_device():
            step.divide(*get_metadata(step.kv_lens, step.max_query * heads, 1, heads))
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        keys = kv_cache.memo.get("musa.flashmla")
        if keys is None:
            keys = kv_cache.memo["musa.flashmla"] = kv_cache.data[0].unsqueeze(2)
        o, lse = attend(
            q.view(step.rows, step.max_query, heads, width), keys, step.table, step.kv_lens, latent, step.tiles,
            step.splits, softmax_scale=scale, causal=True,
        )  # fmt: skip
        return (o.flatten(0, 1), lse.flatten(0, 1)) if return_lse else o.flatten(0, 1)

    return Kernels(plan=plan, call=call)
