"""Launches inside captured graphs that hold lengths of the host: recorded at capture, issued again at every refill.

A captured task keeps the lists it was called with. So the call is made between ``graph_task_group_begin`` and ``_end``,
which gives a handle; later the same call with new lists, on another stream and between ``graph_task_update_begin`` and
``_end``, changes the task. An external event in front of the task keeps a replay waiting until its update is through:
the graph waits for it and resets it, the update records it. From this follows how a captured plan is used: fill it,
replay once, fill it again; a replay without a fill before it waits for ever. Fills and replays share one stream.

A fill waits on the host twice. First until the stream is empty, as vllm-ascend does before it replays: an update must
not overtake the replay before it, whose reset would swallow the event. Last until the updates are through: after a fill
that was never replayed the event is recorded already, and would let a replay run ahead of the next fill's updates.

Sources: op-plugin torch_npu-npu-graph_task_*.md (517f2e7; A2 and A3, another stream for updates); torch_npu
2.10.0.post4 npu/graphs.py (weak references); vllm-ascend 182b75e attention_v1.py full_graph_fia, acl_graph.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from attn_core.adapters import load
from attn_core.runtime import Capture
from attn_plugin_ascend.backends import TORCH_NPU


class Runtime(NamedTuple):
    """What torch_npu offers for this, under its own names."""

    ExternalEvent: Any
    Stream: Any
    current_stream: Any
    graph_task_group_begin: Any
    graph_task_group_end: Any
    graph_task_update_begin: Any
    graph_task_update_end: Any
    is_current_stream_capturing: Any
    stream: Any


def runtime() -> tuple[Runtime, Callable[[Tensor], Tensor]]:
    """The functions, and torch_npu's own way to name memory of a graph's pool without keeping it from its reuse."""
    return (
        Runtime(*load(TORCH_NPU, "torch_npu.npu", *Runtime._fields)),
        load(TORCH_NPU, "torch_npu._C", "_weak_ref_tensor"),
    )


class Launch(NamedTuple):
    handle: Any
    event: Any
    issue: Callable[..., Any]
    """Takes the keywords that change."""


class Launches:
    """One plan's launches in the graphs that were captured on it: a call per layer, in the order of capture."""

    __slots__ = ("_capture", "_launches", "_npu", "_page_size", "_table", "_updates", "_weak", "_workspace")

    def __init__(self, npu: Runtime, weak: Callable[[Tensor], Tensor], page_size: int | None, capture: Capture) -> None:
        self._npu, self._weak = npu, weak
        self._page_size, self._capture = page_size or 1, capture
        self._launches: list[Launch] = []
        self._updates: Any = None
        self._table: Tensor | None = None
        self._workspace: Tensor | None = None

    @property
    def longest(self) -> list[int]:
        """Key lengths of the largest step that the graphs serve."""
        return [self._capture.max_kv_len] * self._capture.max_seqs

    def table(self, new: Tensor) -> Tensor:
        """``new`` int32 ``(max_seqs, pages)`` in the buffer that the graphs read."""
        if self._table is None:
            pages = -(-self._capture.max_kv_len // self._page_size)
            self._table = new.new_zeros(self._capture.max_seqs, pages)
            self._updates = self._npu.Stream(device=new.device)  # made here: within a capture nothing may be made
        width = min(self._table.shape[1], new.shape[1])
        self._table[:, :width].copy_(new[:, :width])
        return self._table

    def record(
        self,
        operator: Callable[..., Any],
        workspace: Callable[..., Tensor],
        outputs: tuple[Tensor, Tensor],
        temporary: Mapping[str, Tensor],
        lasting: Mapping[str, Any],
        changing: Mapping[str, Any],
        largest: Mapping[str, Any],
    ) -> None:
        """Issue ``operator`` into the capture that is under way, and remember it.

        ``temporary`` tensors and ``outputs`` (output, LSE) may lie in the graph's pool and are not kept from its reuse.
        ``workspace`` gives that of the step ``largest``, which is ``changing`` at its longest; all layers of a group
        have one shape and share it.
        """
        if self._workspace is None:
            self._workspace = workspace(**temporary, **lasting, **largest)
        issue = partial(
            operator, **{name: self._weak(t) for name, t in temporary.items()}, **lasting, workspace=self._workspace,
            out=[self._weak(t) for t in outputs],
        )  # fmt: skip
        npu, event = self._npu, self._npu.ExternalEvent()
        stream = npu.current_stream(outputs[0].device)
        event.wait(stream)
        event.reset(stream)
        npu.graph_task_group_begin(stream)
        issue(**changing)
        self._launches.append(Launch(npu.graph_task_group_end(stream), event, issue))

    def again(self, changing: Mapping[str, Any]) -> None:
        """Issue every launch again with ``changing``, for the next replay."""
        if not self._launches or self._table is None:
            return
        npu, updates = self._npu, self._updates
        npu.current_stream(self._table.device).synchronize()
        with npu.stream(updates):
            for launch in self._launches:
                npu.graph_task_update_begin(updates, launch.handle)
                launch.issue(**changing)
                npu.graph_task_update_end(updates)
                launch.event.record(updates)
        updates.synchronize()
