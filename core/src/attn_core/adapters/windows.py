"""``sliding_window=W`` (W tokens, the token itself included) in each vendor's convention."""

from __future__ import annotations

from attn_core.runtime.binding import Binding


def both_sides(b: Binding, unlimited: int = -1) -> tuple[int, int]:
    """(keys to the left, keys to the right) besides the query's own position; ``unlimited`` means all (FlashAttention).

    Causal kernels see none to the right; encoders see |i - j| < W.
    """
    if b.sliding_window is None:
        return (unlimited, unlimited)
    return (b.sliding_window - 1, 0 if b.spec.causal else b.sliding_window - 1)


def left(b: Binding) -> int:
    """Keys to the left besides the query's own position, -1 for all (FlashInfer, trtllm-gen)."""
    return -1 if b.sliding_window is None else b.sliding_window - 1
