"""Join two partial attentions over disjoint keys, by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_state(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` of attention over the keys of both sides.

    ``o_*`` ``(tokens, heads, width)``; ``lse_*`` ``(tokens, heads)``, natural log. Computed in float32 at least; the
    output has ``o_a``'s dtype, or is written to ``out`` (which may be ``o_a`` or ``o_b``). A side with lse -inf saw no
    key and is ignored, whatever its output holds; two such sides give zeros and -inf. With sinks in one side's
    denominator the result has them once.

    Source: the attention states of FlashInfer (arXiv 2501.01005).
    """
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -torch.inf, 0.0, top)
    w_a, w_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = w_a + w_b
    share = torch.where(total == 0, 1.0, total)
    o = _weighted(o_a, w_a / share) + _weighted(o_b, w_b / share)
    lse = top + torch.log(total)
    return (o.to(o_a.dtype) if out is None else out.copy_(o)), lse


def _weighted(o: Tensor, weight: Tensor) -> Tensor:
    """``o * weight`` with zeros where the weight is zero, even if ``o`` holds NaN there."""
    weight = weight.unsqueeze(-1)
    return torch.where(weight == 0, 0.0, o.to(torch.promote_types(o.dtype, weight.dtype)) * weight)
