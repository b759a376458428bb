"""What one step needs once: the kernels' own plans, and the function that ``forward`` will call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.runtime.batch import Batch
from attn_core.runtime.pages import key_slots
from attn_core.spec import check

if TYPE_CHECKING:
    from attn_core.runtime.bound import BoundGroup


@dataclass(frozen=True)
class Capture:
    """The largest step a captured graph will serve: decode rows only, ``max_seqs`` of ``decode_width`` tokens each."""

    max_seqs: int
    decode_width: int
    max_kv_len: int

    def __post_init__(self) -> None:
        for name in ("max_seqs", "decode_width", "max_kv_len"):
            check.size("Capture", name, getattr(self, name))


class Plan:
    """One step of one group. Owned by the engine, which holds as many as it has batches in flight.

    ``plan(batch, out=p)`` refills ``p``: same object, same kernel plans, so workspaces, wrappers and captured
    addresses survive. Between a failed refill and the next good one every use raises.
    """

    __slots__ = (
        "__weakref__", "batch", "capture", "chunk_tokens", "chunks", "decode", "encode", "group", "kept",
        "num_decode_rows", "num_decode_tokens", "num_pages", "prefill", "step", "write",
    )  # fmt: skip

    group: BoundGroup
    batch: Batch | None
    """The batch as planned: padded to the captured size when there is one."""
    capture: Capture | None
    decode: Any
    """What the decode kernel's plan returned; None when the step has no decode rows."""
    prefill: Any
    """What the prefill kernel's plan returned; None when all rows decode. Unified kernels: the same as ``decode``."""
    encode: Any
    write: Any
    """What the ``kv_write`` kernel's plan returned; None when the batch writes nothing."""
    num_decode_rows: int
    num_decode_tokens: int
    num_pages: int
    """Pages a cache must have for this step; 0 where finding out would wait for the device."""
    chunks: tuple[ContextChunk, ...]
    """Materialised MLA: cached context of the prefill rows, see ``prefill_with_context``."""
    chunk_tokens: int
    """Largest number of keys in a chunk, as last planned."""
    step: Callable[..., Any]
    """What ``forward`` calls for this step: chosen here, so that nothing chooses per call."""
    kept: dict[str, Any]
    """Kernel plans of every role ever filled, kept for the next refill also while a step does without them."""

    def __init__(self, group: BoundGroup, capture: Capture | None) -> None:
        self.group, self.capture, self.kept = group, capture, {}
        self.clear()

    def clear(self) -> None:
        """Forget the step, keep the workspaces."""
        self.batch = None
        self.decode = self.prefill = self.encode = self.write = None
        self.num_decode_rows = self.num_decode_tokens = self.num_pages = self.chunk_tokens = 0
        self.chunks = ()
        self.step = _unfilled


def _unfilled(*_: Any, **__: Any) -> NoReturn:
    raise AttnCoreError("this plan holds no step: its last plan(batch, out=plan) failed; fill it again first")


@dataclass(frozen=True, eq=False, kw_only=True)
class ContextChunk:
    """A stretch of the prefill rows' cached context, small enough to be expanded at once.

    Row i's keys ``starts[i]`` to ``starts[i] + lens[i]`` of its sequence; rows whose context ended earlier have 0.
    """

    starts: Tensor
    """int32 ``(rows,)``, host."""
    lens: Tensor
    """int32 ``(rows,)``, host."""
    block_table: Tensor
    """int32 ``(rows, max_pages)``, device."""
    page_size: int
    batch: Batch
    """All queries of the prefill rows over this chunk's keys: ragged, not causal."""
    plan: Plan
    """The context kernel's plan for ``batch``."""

    @property
    def num_keys(self) -> int:
        return int(self.batch.cu_kv_lens[-1])

    @cached_property
    def slots(self) -> Tensor:
        """Cache row of every key of the chunk, in row order; int64 ``(num_keys,)``, device."""
        b, table = self.batch, self.block_table
        starts = self.starts.to(table.device, non_blocking=True)
        return key_slots(table, b.cu_kv_lens_device, b.kv_lens_device, self.num_keys, self.page_size, starts)

    @property
    def cu_kv_lens(self) -> Tensor:
        """Cumulative ``lens``, int32 ``(rows + 1,)``, host."""
        return self.batch.cu_kv_lens
