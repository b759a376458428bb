"""vLLM's layouts of a paged cache, and one layer's tensor as a :class:`KVCache` without a copy.

A layer's cache has the logical shape ``(blocks, kv heads, block size, 2 * head_dim)`` (MLA: one head of latent and
rope) whatever the layout: layouts order memory, strides tell. What the last axis holds is the writer's business; ours
is K, then V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attn_core.errors import BadInputError, BindError

if TYPE_CHECKING:
    from torch import Tensor

    from attn_core.runtime import BoundGroup, KVCache

ORDERS: Mapping[str, str] = {
    "LBNHC": "NHD",
    "BLNHC": "NHD",
    "LHBNC": "NHD",
    "LBHNC": "HND",
    "BLHNC": "HND",
    "BHLNC": "HND",
}
"""vLLM's layouts -> which of our two views walks them in steps of whole rows. Of ``LHBNC``, where a head's pages lie
apart from the other heads', neither does; NHD readers step by pages alone, and so need no such rows."""

LATENT = ("MLA", "MLA_SPLIT")

PRIVATE = ("LBHNC",)
"""What a private layout gets: pages whole and side by side, in the order of the logical shape."""


def layouts_for(kv_layouts: Sequence[str]) -> tuple[str, ...]:
    """vLLM's layouts in which groups with these of ours can live together, most preferred first; empty when none is."""
    wanted = [_layouts_of(name) for name in kv_layouts]
    return tuple(name for name in wanted[0] if all(name in others for others in wanted[1:])) if wanted else ()


def _layouts_of(kv_layout: str) -> tuple[str, ...]:
    if kv_layout in LATENT:
        return tuple(ORDERS)
    if kv_layout in ORDERS.values():
        return tuple(name for name, order in ORDERS.items() if order == kv_layout)
    return PRIVATE


def wrapped(tensor: Tensor, group: BoundGroup, layer: Any) -> KVCache:
    """One layer's cache as ``group`` reads it; the same memory.

    ``layer`` has the scales of a quantised cache (``_k_scale_float``, ``_v_scale_float``). Raises :class:`BindError`
    for a tensor of another shape, block size or dtype.
    """
    from attn_core.runtime import wrap_kv_cache

    layout, spec = group.kv_layout, group.spec
    if layout is None or group.page_size is None or group.kv_dtype is None:
        raise BindError(f"group {group.name!r} keeps no cache, but vLLM allocated one: {tuple(tensor.shape)}")
    mla = spec.kind == "mla"
    if mla:
        tensor = tensor if tensor.dim() == 4 else tensor.unsqueeze(1)
        heads, widths = 1, (spec.latent_dim or 0, spec.rope_dim or 0)
    else:
        heads, widths = spec.num_kv_heads, (spec.head_dim, spec.v_head_dim)
    expected = (heads, group.page_size, sum(widths))
    fits = tuple(tensor.shape[1:]) == expected and tensor.stride(-1) == 1
    if not fits or tensor.dtype.itemsize != group.kv_dtype.itemsize:
        raise BindError(
            f"group {group.name!r} was bound for a cache of (blocks, {', '.join(map(str, expected))}) "
            f"{group.kv_dtype}; vLLM gave {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
        )
    tensor = tensor.view(group.kv_dtype)
    parts = _parts(tensor, layout, widths)
    return wrap_kv_cache(
        *parts, layout=layout, page_size=group.page_size, k_scale=layer._k_scale_float, v_scale=layer._v_scale_float
    )


def _parts(tensor: Tensor, layout: str, widths: tuple[int, int]) -> tuple[Tensor, ...]:
    """Views of ``(blocks, heads, block size, width)`` as the layout has its tensors."""
    if layout == "MLA":
        return (tensor.squeeze(1),)
    if layout == "MLA_SPLIT":
        return tuple(tensor.squeeze(1).split_with_sizes(widths, -1))
    if layout == "HND":
        return tuple(tensor.split_with_sizes(widths, -1))
    if layout == "NHD":
        return tuple(tensor.transpose(1, 2).split_with_sizes(widths, -1))
    if not tensor.is_contiguous():
        raise BadInputError(f"layout {layout} wants its pages side by side; strides are {tensor.stride()}")
    return (tensor,)
