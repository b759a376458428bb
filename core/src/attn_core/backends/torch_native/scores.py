"""softmax(scale q k^T + mask) v for one tile, in the two ways torch has.

Both take q ``(A, B, rows, width)``, k and v ``(A, B, keys, width)`` (the same for all of B, a stride-0 axis: that is
how query heads share k and v without a copy), a float32 mask that broadcasts to ``(A, B, rows, keys)`` or None, and
return the output in q's dtype and the float32 log-sum-exp ``(A, B, rows)``. A row that sees nothing gives zeros; its
log-sum-exp is -inf in :func:`written_out` and 0 in :func:`fused`, whose caller knows such rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool, float], "tuple[Tensor, Tensor]"]
"""``(q, k, v, mask, causal, scale) -> (output, lse)``; ``causal``: a square tile, lower triangle."""


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's flash attention for CPU, called below ``scaled_dot_product_attention``, which hides its log-sum-exp.

    Scores and sums are float32 whatever the dtype; k and v need q's width.
    """
    result: tuple[Tensor, Tensor] = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return result


def fused_checking_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`fused` for masks from outside, which may hide every key of a row."""
    out, lse = fused(q, k, v, mask, causal, scale)
    return out, lse if mask is None else lse.masked_fill(mask.amax(-1) == float("-inf"), float("-inf"))


_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
HAS_FUSED = _flash is not None


def written_out(softcap: float | None) -> Attend:
    """Plain matmuls and an explicit softmax, for what the fused kernel cannot do and for other devices.

    Expects float32: half precision is slow on CPUs (float16 matmuls by a factor of ten and more) and loses digits.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        a, b, rows, width = q.shape
        scores = torch.bmm((q * scale).reshape(a, b * rows, width), k[:, 0].transpose(1, 2)).view(a, b, rows, -1)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores += mask
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == float("-inf"), 0.0)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights.view(a, b * rows, -1), v[:, 0]).view(a, b, rows, -1)
        lse = (top + total.log()).squeeze(-1)
        return out.div_(total.clamp_min_(TINY)), lse

    return attend


TINY = torch.finfo(torch.float32).tiny
"""Divides the sum of a row without keys, which is zero; the sum of any other row is at least 1."""
