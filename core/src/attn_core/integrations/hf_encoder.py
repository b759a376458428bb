"""A padded batch of transformers through a group's ``encode`` kernel: unpadded, packed, attended to, padded again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.integrations.hf_call import LATER
from attn_core.integrations.hf_mask import Padding, read_padding
from attn_core.runtime import Batch, BoundGroup, Plan


@dataclass
class _Step:
    """One forward of the model as this group sees it. Layers of one forward hand over the very same mask."""

    mask: weakref.ref[Tensor] | None
    shape: tuple[int, int]
    padding: Padding
    callers: set[Hashable] = field(default_factory=set)
    """Layers that used it. A layer that comes again begins another forward, whose mask may have changed in place."""

    def serves(self, caller: Hashable, mask: Tensor | None, shape: tuple[int, int]) -> bool:
        same = mask is None if self.mask is None else self.mask() is mask
        return same and shape == self.shape and caller not in self.callers


class EncoderGroup:
    """Runs the layers of one bound encoder group. Mask and plan are read and filled once per forward of the model.

    Plans are per thread: a server may run one model in several.
    """

    def __init__(self, group: BoundGroup) -> None:
        self.group = group
        self._here = threading.local()

    def __call__(self, caller: Hashable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q ``(batch, heads, length, width)``, k and v with their own heads; returns ``(batch, length, heads, width)``.

        Rows of padding tokens are zeros, as flash implementations leave them. Raises :class:`AttnCoreError` for
        queries and keys that differ in length, and for masks that are more than padding.
        """
        batch, _, length, _ = q.shape
        if k.shape[2] != length:
            raise AttnCoreError(
                f"group {self.group.name!r}: {length} queries over {k.shape[2]} keys; cross attention and caches are "
                f"{LATER}"
            )
        padding, plan = self._step(caller, mask, (batch, length))
        new = q.new_empty if padding.index is None else q.new_zeros
        padded = new((batch * length, q.shape[1], v.shape[-1]))
        if plan is not None:
            packed = [_pack(x, padding.index) for x in (q, k, v)]
            if padding.index is None:
                self.group.forward(*packed, None, plan, out=padded)
            else:
                padded[padding.index] = self.group.forward(*packed, None, plan)
        return padded.view(batch, length, *padded.shape[1:])

    def _step(self, caller: Hashable, mask: Tensor | None, shape: tuple[int, int]) -> tuple[Padding, Plan | None]:
        here: Any = self._here
        step: _Step | None = getattr(here, "step", None)
        if step is None or not step.serves(caller, mask, shape):
            here.step = None  # a mask that is refused leaves nothing behind
            padding = read_padding(mask, *shape, self.group.spec.sliding_window)
            if padding.lens:
                batch = Batch(padding.lens, attn_type="encoder_only", device=self.group.torch_device)
                here.plan = self.group.plan(batch, out=getattr(here, "plan", None))
            step = here.step = _Step(None if mask is None else weakref.ref(mask), shape, padding)
        step.callers.add(caller)
        return step.padding, here.plan if step.padding.lens else None


def _pack(x: Tensor, index: Tensor | None) -> Tensor:
    """``(batch, heads, length, width)`` as ``(tokens, heads, width)``; no copy where the model only transposed."""
    flat = x.transpose(1, 2).flatten(0, 1)
    if index is not None:
        return flat[index]
    return flat if flat.stride(-1) == 1 else flat.contiguous()
