"""What an attention mask of transformers says, as ragged lengths. Only plain padding is read; all else is refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError

_ALLOWED = "this integration reads padding on the left or right of each sequence, and the windows of the model itself"


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The real tokens of a padded batch. Sequences without any are left out of ``lens``."""

    lens: tuple[int, ...]
    """Real tokens of each sequence that has some, in order."""
    index: Tensor | None
    """Places of the real tokens in the flattened ``(batch * length,)``, int64; None when all tokens are real."""


def read_padding(mask: Tensor | None, batch: int, length: int, window: int | None) -> Padding:
    """The lengths behind a bidirectional mask, having verified that it says nothing else.

    ``mask`` is ``(batch or 1, 1, length, length)``, bool (True = attend) or additive floats (0 = attend, the most
    negative number = do not), or None: every token sees every other. ``window`` is the group's W, |i-j| < W.
    Every entry in a real token's row is compared with what padding and window imply, so that a mask with any other
    meaning (packed documents, prefixes, biases, heads) raises :class:`AttnCoreError`. Rows of padding tokens are free.
    """
    if mask is None:
        return Padding(lens=(length,) * batch, index=None)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, length, length):
        raise AttnCoreError(
            f"attention mask of shape {tuple(mask.shape)} is not supported: expected ({batch}, 1, {length}, {length}), "
            f"the same for all heads, as queries and keys have it; {_ALLOWED}"
        )
    seen = _visible(mask)[:, 0]
    if seen.stride(1) == 0:  # one row shown to all queries: what transformers makes of padding alone
        seen = seen[:, :1]
    keys = seen.any(1)
    expected = keys[:, None]
    if window is not None and window < length:
        place = torch.arange(length, device=mask.device)
        expected = expected & ((place[:, None] - place).abs() < window)
    runs = (keys[:, 1:] & ~keys[:, :-1]).sum(1) + keys[:, 0]
    if bool(((seen != expected) & keys[:, :, None]).any()) or bool((runs > 1).any()):
        raise AttnCoreError(f"attention mask hides or shows more than padding does, which is not supported; {_ALLOWED}")
    keys = keys.expand(batch, -1)
    lens = tuple(n for n in keys.sum(1).tolist() if n)
    whole = sum(lens) == batch * length
    return Padding(lens=lens, index=None if whole else keys.flatten().nonzero().squeeze(1))


def _visible(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise AttnCoreError(f"attention mask of {mask.dtype} is not supported; give bool, or floats added to logits")
    hidden = mask <= torch.finfo(mask.dtype).min / 2  # transformers uses the minimum, others -inf
    shown = mask == 0
    if not bool((shown | hidden).all()):
        raise AttnCoreError(f"attention mask adds numbers to logits: a bias is not supported here; {_ALLOWED}")
    return shown
