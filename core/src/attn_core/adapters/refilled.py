"""The ``plan`` function of kernels whose step is one object that is filled from the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from attn_core.runtime.batch import Batch
from attn_core.runtime.plan import Capture


class Step(Protocol):
    """What a plan holds for one role."""

    def fill(self, batch: Batch) -> None:
        """Take over the batch's rows."""


S = TypeVar("S", bound=Step)


def refilled(make: Callable[[Capture | None], S]) -> Callable[..., S]:
    """``plan(batch, *, capture=None, out=None)``: a step of ``make(capture)``, made once and filled every step."""

    def plan(batch: Batch, *, capture: Capture | None = None, out: S | None = None) -> S:
        step = make(capture) if out is None else out
        step.fill(batch)
        return step

    return plan
