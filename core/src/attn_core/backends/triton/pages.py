# mypy: ignore-errors
"""The kernels that write new keys to pages and read stretches of pages back. Triton's language; mypy does not know it.

A program takes one key and ``BLOCK_H`` heads of it, k and then v. 8-bit caches hold ``value / scale``, clamped to what
the dtype can hold and rounded to the nearest value, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a small float32 and taken off again, it leaves the nearest integer."""


@triton.jit
def write(
    k, v, k_cache, v_cache, slots, k_scale, v_scale, k_token, k_head, v_token, v_head,
    k_page, k_place, k_cache_head, v_page, v_place, v_cache_head, k_scale_head, v_scale_head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, K_WIDTH: tl.constexpr, K_BLOCK: tl.constexpr, V_WIDTH: tl.constexpr,
    V_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """A new key to its slot. Nothing is written for slot -1, nor to the null page."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0) // BLOCKS
    slot = tl.load(slots + token)
    if slot < PAGE:
        return
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    page, place, token = slot // PAGE, slot % PAGE, token.to(tl.int64)
    put(
        k + token * k_token, k_head, k_cache + page * k_page + place * k_place, k_cache_head, k_scale, k_scale_head,
        head, HEADS, K_WIDTH, K_BLOCK, LOWEST, HIGHEST, INTEGER,
    )  # fmt: skip
    put(
        v + token * v_token, v_head, v_cache + page * v_page + place * v_place, v_cache_head, v_scale, v_scale_head,
        head, HEADS, V_WIDTH, V_BLOCK, LOWEST, HIGHEST, INTEGER,
    )  # fmt: skip


@triton.jit
def put(
    source, source_head, target, target_head, scale, scale_head, head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Some heads of one key; HIGHEST 0 means no 8-bit cache."""
    column = tl.arange(0, BLOCK)
    inside = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(source + head[:, None] * source_head + column[None, :], mask=inside, other=0.0)
    if HIGHEST > 0:
        x = x.to(tl.float32) / tl.load(scale + head * scale_head, mask=head < HEADS, other=1.0)[:, None]
        x = tl.minimum(tl.maximum(x, LOWEST), HIGHEST)
        if INTEGER:
            x = x + TO_INTEGER - TO_INTEGER
    tl.store(target + head[:, None] * target_head + column[None, :], x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def gather(
    k, v, k_cache, v_cache, slots, k_scale, v_scale,
    k_page, k_place, k_cache_head, v_page, v_place, v_cache_head, k_scale_head, v_scale_head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, K_WIDTH: tl.constexpr, K_BLOCK: tl.constexpr, V_WIDTH: tl.constexpr,
    V_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """A key from its slot to its row of k and v, which are contiguous."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    slot = tl.load(slots + row)
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    page, place = slot // PAGE, slot % PAGE
    get(
        k_cache + page * k_page + place * k_place, k_cache_head, k + row * HEADS * K_WIDTH, k_scale, k_scale_head,
        head, HEADS, K_WIDTH, K_BLOCK, QUANTISED,
    )  # fmt: skip
    get(
        v_cache + page * v_page + place * v_place, v_cache_head, v + row * HEADS * V_WIDTH, v_scale, v_scale_head,
        head, HEADS, V_WIDTH, V_BLOCK, QUANTISED,
    )  # fmt: skip


@triton.jit
def get(
    source, source_head, target, scale, scale_head, head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(source + head[:, None] * source_head + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if QUANTISED:
        x = x * tl.load(scale + head * scale_head, mask=head < HEADS, other=1.0)[:, None]
    tl.store(target + head[:, None] * WIDTH + column[None, :], x.to(target.dtype.element_ty), mask=inside)
