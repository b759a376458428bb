"""Layout ``VLLM_CPU``: one tensor ``(pages, kv heads, page_size, 2 * head_dim)``, whose insides only its writer knows.

That is the shape of a layer's cache in vLLM on CPUs, so ``wrap_kv_cache(tensor, layout="VLLM_CPU", page_size=P)``
takes an engine's own without a copy. The first half of what a page holds for a head are its keys, the second its
values: seen as ``(2 * page_size, head_dim)``, cut in the middle. Within a half, elements lie as the instruction set
wants them (keys transposed for AVX, pairs of tokens interleaved for AMX), so pages never move between machines of
different kind, nor between head widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_core.errors import BadInputError
from attn_core.runtime import KVCache
from attn_core.runtime.binding import Binding

LAYOUT = "VLLM_CPU"
Halves = tuple[Tensor, Tensor]


def allocator(b: Binding) -> Callable[[int], tuple[Tensor]]:
    """``allocate(num_pages)`` of a binding."""

    def allocate(num_pages: int) -> tuple[Tensor]:
        return (torch.empty(num_pages, b.num_kv_heads, b.page_size or 0, 2 * b.head_dim, dtype=b.kv_dtype),)

    return allocate


def halves_of(b: Binding) -> Callable[[KVCache], Halves]:
    """A function from a cache to its keys and values, each ``(pages, kv heads, page_size, head_dim)`` as the operators
    want them. Made and checked once per cache, because the operators trust what they are given."""
    key = f"vllm_cpu {b.num_kv_heads} {b.page_size} {b.head_dim} {b.kv_dtype}"

    def halves(cache: KVCache) -> Halves:
        found: Halves | None = cache.memo.get(key)
        if found is None:
            found = cache.memo[key] = _halves(cache, b)
        return found

    return halves


def _halves(cache: KVCache, b: Binding) -> Halves:
    t, page_size, width = cache.data[0], b.page_size or 0, 2 * b.head_dim
    storage = {b.kv_dtype, torch.uint8} if b.kv_dtype is not None and b.kv_dtype.itemsize == 1 else {b.kv_dtype}
    inside = (b.num_kv_heads, page_size, width)
    if len(cache.data) != 1 or tuple(t.shape[1:]) != inside or t.stride()[2:] != (width, 1) or t.dtype not in storage:
        raise BadInputError(
            f"layout {LAYOUT} is one {b.kv_dtype} tensor (pages, {', '.join(map(str, inside))}), its last two axes "
            f"contiguous; got {[(x.dtype, tuple(x.shape), x.stride()) for x in cache.data]}"
        )
    k, v = _bytes(t).view(t.shape[0], b.num_kv_heads, 2 * page_size, b.head_dim).chunk(2, dim=2)
    return k, v


Write = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def places_of(b: Binding, write: Write) -> Halves:
    """Where the writer puts each element: int64 ``(page_size, head_dim)`` for keys and for values, into a half.

    Asked of the writer itself, which knows its instruction set: it writes a page that holds the numbers of its own
    places, digit by digit, in digits that every dtype holds exactly.
    """
    page_size, width, base = b.page_size or 0, b.head_dim, 8
    number = torch.arange(page_size * width).view(page_size, 1, width)
    slots = torch.arange(page_size)
    order = [torch.zeros(page_size * width, dtype=torch.long) for _ in range(2)]
    unit = 1
    while unit < page_size * width:
        digit = (number // unit % base).to(b.dtype)
        page = torch.zeros(1, 1, 2 * page_size, width, dtype=b.kv_dtype)
        k, v = _bytes(page).chunk(2, dim=2)
        write(digit, digit, k, v, slots)
        for found, half in zip(order, page.chunk(2, dim=2)):
            found += half.reshape(-1).float().long() * unit
        unit *= base
    k_place, v_place = (found.argsort().view(page_size, width) for found in order)
    return k_place, v_place


def _bytes(t: Tensor) -> Tensor:
    """8-bit floats as the operators know them."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t
