"""SGLang's KV pools as attn-core sees them: each layer's tensors wrapped without a copy, and pages of window layers.

A pool is a row per token slot, the first ``page_size`` rows never handed out: page 0 is the null page here too. A
hybrid pool has a smaller one for window layers. Requests know only slots of the full pool; a table maps each to its
row in the small pool, or to 0 once the window has moved past it and the row was given to somebody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.runtime import KVCache, wrap_kv_cache

Translate = Callable[[Tensor], Tensor]

PLAIN = {"NHD": ("MHATokenToKVPool", "nhd"), "MLA": ("MLATokenToKVPool", None)}
"""Layout -> class and row layout of the pool whose rows are keys and values (MLA: latent and rope) as they are."""


def translation(pool: Any, layer: int) -> Translate | None:
    """What takes slots of requests to rows of a layer's own tensors; None where they are the same."""
    hybrid = getattr(pool, "layers_mapping", None)
    return pool.translate_loc_from_full_to_swa if hybrid is not None and hybrid[layer][1] else None


def wrap_layer(pool: Any, layer: int, *, layout: str, page_size: int, scales: tuple[float, float]) -> KVCache:
    """One layer's rows ``(slots, heads, width)`` as pages ``(slots / page_size, page_size, heads, width)``, no copy;
    MLA's without heads.

    Raises :class:`AttnCoreError` for pools that quantise, split or reorder rows.
    """
    part = pool
    if hasattr(pool, "layers_mapping"):
        part = pool.swa_kv_pool if pool.layers_mapping[layer][1] else pool.full_kv_pool
    found = (type(part).__name__, getattr(part, "kv_cache_layout", None))
    if found != PLAIN[layout]:
        raise AttnCoreError(
            f"layer {layer} keeps its keys in SGLang's {found[0]} (layout {found[1]}); the SGLang integration reads "
            f"{PLAIN[layout][0]} (layout {PLAIN[layout][1]}), alone or in a SWAKVPool"
        )
    k = in_pages(pool.get_key_buffer(layer), page_size)
    parts = (k.squeeze(2),) if layout == "MLA" else (k, in_pages(pool.get_value_buffer(layer), page_size))
    return wrap_kv_cache(*parts, layout=layout, k_scale=scales[0], v_scale=scales[1])


def in_pages(rows: Tensor, page_size: int) -> Tensor:
    """A view of whole pages; rows past the last whole page are left out (SGLang hands out none of them)."""
    pages = rows.shape[0] // page_size
    return rows[: pages * page_size].view(pages, page_size, *rows.shape[1:])


def page_table(
    req_to_token: Tensor, requests: Tensor, longest: int, page_size: int, translate: Translate | None
) -> Tensor:
    """int32 ``(rows, pages)``: the page of every ``page_size``-th token of each request.

    ``req_to_token`` int32 ``(requests, context)`` holds the slot of each token; what lies past a request's length is
    stale and never read. Pages whose window rows were given away read as page 0.
    """
    slots = req_to_token[requests, : -(-longest // page_size) * page_size : page_size]
    if translate is not None:
        slots = translate(slots.long())
    return torch.div(slots, page_size, rounding_mode="floor").to(torch.int32)
