# mypy: ignore-errors
"""Joins two partial attentions over disjoint keys, by their log-sum-exp: the kernel, and the function that launches it.

A program takes ``ROWS`` rows, each one token of one head: ``o = (w_a o_a + w_b o_b) / (w_a + w_b)`` with
``w = exp(lse - max(lse_a, lse_b))``, in float32 (arXiv 2501.01005).
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from attn_core.backends.triton.widths import power_of_two

ROWS = 16


@triton.jit
def join(
    o_a, lse_a, o_b, lse_b, out, lse, tokens, a_token, a_head, b_token, b_head, lse_a_token, lse_a_head, lse_b_token,
    lse_b_head, out_token, out_head, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A side with lse -inf saw no key: it is ignored, whatever its output holds. Two such sides give zeros and -inf."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    live = token < tokens
    x = tl.load(lse_a + token * lse_a_token + head * lse_a_head, mask=live, other=float("-inf"))
    y = tl.load(lse_b + token * lse_b_token + head * lse_b_head, mask=live, other=float("-inf"))
    top = tl.maximum(x, y)
    base = tl.where(top == float("-inf"), 0.0, top)
    w_a, w_b = tl.exp(x - base), tl.exp(y - base)
    total = w_a + w_b
    share = tl.where(total == 0.0, 1.0, total)
    column = tl.arange(0, BLOCK)
    here = live[:, None] & (column < WIDTH)[None, :]
    at = (token * a_token + head * a_head)[:, None] + column[None, :]
    a = tl.load(o_a + at, mask=here & (w_a > 0.0)[:, None], other=0.0).to(tl.float32)
    at = (token * b_token + head * b_head)[:, None] + column[None, :]
    b = tl.load(o_b + at, mask=here & (w_b > 0.0)[:, None], other=0.0).to(tl.float32)
    o = a * (w_a / share)[:, None] + b * (w_b / share)[:, None]
    at = (token * out_token + head * out_head)[:, None] + column[None, :]
    tl.store(out + at, o.to(out.dtype.element_ty), mask=here)
    tl.store(lse + row, base + tl.log(total), mask=live)


def merge_state(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`attn_core.merge_state`, in one launch. ``out`` may be ``o_a`` or ``o_b``."""
    o_a, o_b = (t if t.stride(-1) == 1 else t.contiguous() for t in (o_a, o_b))
    tokens, heads, width = o_a.shape
    made = torch.empty_like(o_a) if out is None else out
    target = made if made.stride(-1) == 1 else torch.empty_like(o_a)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=o_a.device)
    if tokens:
        join[(triton.cdiv(tokens * heads, ROWS),)](
            o_a, lse_a, o_b, lse_b, target, lse, tokens, *o_a.stride()[:2], *o_b.stride()[:2], *lse_a.stride(),
            *lse_b.stride(), *target.stride()[:2], HEADS=heads, WIDTH=width, BLOCK=power_of_two(width), ROWS=ROWS,
        )  # fmt: skip
    return (made if target is made else made.copy_(target)), lse
