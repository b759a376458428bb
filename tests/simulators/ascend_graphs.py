"""torch_npu's graphs, streams, external events and task groups, for tensors of any device that torch can compute on.

A capture keeps every operator of torch and every kernel of the package with the arguments it was called with, and what
they would have computed is NaN until a replay. A replay runs them in order, on the same memory. Where the real graph
would wait for ever, read other memory or replay stale values, this one raises or does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simulators.contract import Misuse, Refused

GRAPHS = "torch_npu.npu.graphs"
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}
Answer = Callable[[SimpleNamespace], Any]


class Task:
    """One launch of a kernel of the package, with the values it was called with."""

    def __init__(self, answer: Answer, given: SimpleNamespace, made: Any) -> None:
        self.answer, self.given, self.made = answer, given, made

    def __call__(self) -> None:
        for kept, new in zip(tree_leaves(self.made), tree_leaves(self.answer(self.given))):
            if kept is not new and isinstance(kept, Tensor):
                kept.copy_(new)

    def renew(self, answer: Answer, given: SimpleNamespace) -> None:
        if answer is not self.answer:
            raise Misuse("a task is updated by another function than the one it was captured with")
        for name, before in vars(self.given).items():
            places = [[t.data_ptr() for t in tree_leaves(x) if isinstance(t, Tensor)]
                      for x in (before, getattr(given, name))]  # fmt: skip
            if places[0] != places[1]:
                raise Misuse(f"a task is updated with {name} in other memory than it was captured with")
        self.given = given


class Recorder(TorchDispatchMode):
    """A capture under way on one stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream
        self.nodes: list[Callable[[], Any]] = []
        self.group: list[Task] | None = None
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.quiet or func.namespace != "aten":
            return func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func in READS or len({t.device for t in given if t.dim()}) > 1:
            raise Refused(f"{func} waits for the device, which a capture cannot")
        arguments = func._schema.arguments
        named = {**dict(zip((a.name for a in arguments), args)), **kwargs}
        written = [named[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        if written:
            self.nodes.append(partial(func, *args, **kwargs))
            return written[0] if func._schema.returns else None
        out = func(*args, **kwargs)
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        mine = {t.untyped_storage().data_ptr() for t in given}
        if any(t.untyped_storage().data_ptr() in mine for t in new) or "empty" in func.__name__:
            poison(new if "empty" in func.__name__ else [])
            return out  # a view, or memory without a value
        self.nodes.append(Task(lambda _: func(*args, **kwargs), SimpleNamespace(), out))
        poison(new)
        return out

    @contextmanager
    def suspended(self) -> Iterator[None]:
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before


def poison(made: Any) -> None:
    """Nothing was computed yet."""
    for t in tree_leaves(made):
        if isinstance(t, Tensor) and t.is_floating_point():
            t.fill_(float("nan"))


class Group:
    """What ``graph_task_group_end`` gives."""

    def __init__(self, recorder: Recorder, tasks: list[Task]) -> None:
        self.recorder, self.tasks = recorder, tasks


class World:
    """Streams, and what is being captured and updated: one process's torch_npu.

    ``home`` is the current device.
    """

    def __init__(self, home: str = "cpu") -> None:
        self.home = home
        self.streams: dict[str, Any] = {}
        self.recorder: Recorder | None = None
        self.updating: tuple[Any, list[Task]] | None = None
        self.running: dict[Recorder, Any] = {}
        """Graphs that may still be running, and the stream they run on."""
        self.Stream, self.Event = stream_class(self), event_class(self)

    def place(self, device: Any) -> str:
        d = torch.device(self.home if device is None else device)
        return d.type if d.type == "cpu" else f"{d.type}:{d.index or 0}"

    def current(self, device: Any = None) -> Any:
        place = self.place(device)
        if place not in self.streams:
            self.streams[place] = self.Stream(SimpleNamespace(device=place))
        return self.streams[place]

    @property
    def capturing(self) -> Recorder | None:
        """The capture on what is the current stream."""
        r = self.recorder
        return r if r is not None and self.current(r.stream.device) is r.stream else None

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, place = self.current(stream.device), self.place(stream.device)
        self.streams[place] = stream
        try:
            yield
        finally:
            self.streams[place] = before

    def kernel(self, answer: Answer, *, writes: bool = False) -> Answer:
        """``answer`` as something that can be captured and updated. ``writes``: into its arguments, so that a capture
        must not run it."""

        def launch(a: SimpleNamespace) -> Any:
            a = SimpleNamespace(**{n: list(x) if isinstance(x, list) else x for n, x in vars(a).items()})
            if self.updating is not None:
                stream, left = self.updating
                if self.current(stream.device) is not stream or not left:
                    raise Misuse("launched on another stream than the update's, or once more than was captured")
                left.pop(0).renew(answer, a)
                return getattr(a, "out", None)
            recorder = self.capturing
            if recorder is None:
                return answer(a)
            with recorder.suspended():
                made = None if writes else answer(a)
                poison((made, getattr(a, "out", None)))
            task = Task(answer, a, made)
            recorder.nodes.append(task)
            if recorder.group is not None:
                if getattr(a, "workspace", a) is None:
                    raise Misuse("a captured launch without its workspace: its update would take other memory")
                recorder.group.append(task)
            return made

        return launch

    def answers(self) -> dict[str, Any]:
        """Of the functions in this file's contract."""
        return {
            f"{GRAPHS}.graph_task_group_begin": self.group_begin,
            f"{GRAPHS}.graph_task_group_end": self.group_end,
            f"{GRAPHS}.graph_task_update_begin": self.update_begin,
            f"{GRAPHS}.graph_task_update_end": self.update_end,
            f"{GRAPHS}.is_current_stream_capturing": lambda a: self.capturing is not None,
            f"{GRAPHS}.NPUGraph": graph_class(self),
            f"{GRAPHS}.graph": context_class(self),
            "torch_npu.npu.streams.Stream": self.Stream,
            "torch_npu.npu.streams.ExternalEvent": self.Event,
            "torch_npu.npu.utils.stream": lambda a: self.on(a.stream),
            "torch_npu.npu.utils.current_stream": lambda a: self.current(a.device),
            "torch_npu._C._weak_ref_tensor": lambda a: a.tensor.detach(),
        }

    def group_begin(self, a: SimpleNamespace) -> None:
        recorder = self.recorder
        if recorder is None or a.stream is not recorder.stream or recorder.group is not None:
            raise Refused("graph_task_group_begin: this stream is not being captured, or a group is open already")
        before = [getattr(node, "__func__", None) for node in recorder.nodes[-2:]]
        if before != [self.Event.waits, self.Event.resets]:
            raise Misuse("graph_task_group_begin: nothing makes a replay wait for this group's updates")
        recorder.group = []

    def group_end(self, a: SimpleNamespace) -> Group:
        if self.recorder is None or a.stream is not self.recorder.stream or not self.recorder.group:
            raise Refused("graph_task_group_end: another stream than the group's, or nothing in the group")
        made, self.recorder.group = Group(self.recorder, self.recorder.group), None
        return made

    def update_begin(self, a: SimpleNamespace) -> None:
        if self.updating is not None or self.recorder is not None:
            raise Refused("graph_task_update_begin: an update or a capture is under way")
        if a.stream is a.handle.recorder.stream:
            raise Refused("graph_task_update_begin: updates want another stream than the captured one")
        if a.handle.recorder in self.running:
            raise Misuse("graph_task_update_begin: a replay of this graph may still be running")
        self.updating = (a.stream, list(a.handle.tasks))

    def update_end(self, a: SimpleNamespace) -> None:
        if self.updating is None or self.updating[0] is not a.stream:
            raise Refused("graph_task_update_end: no update is under way on this stream")
        if self.updating[1]:
            raise Misuse(f"graph_task_update_end: {len(self.updating[1])} launches of the group were not issued again")
        self.updating = None


def stream_class(world: World) -> type:
    class Stream:
        def __init__(self, a: SimpleNamespace) -> None:
            if world.recorder is not None:
                raise Refused("Stream: nothing is made within a capture")
            self.device = torch.device(world.place(a.device))
            self.unsettled: list[Any] = []

        def synchronize(self, a: Any = None) -> None:
            if world.recorder is not None:
                raise Refused("synchronize: a capture cannot wait")
            for graph in [g for g, stream in world.running.items() if stream is self]:
                del world.running[graph]
            for event in self.unsettled:
                event.early = False
            self.unsettled.clear()

    return Stream


def event_class(world: World) -> type:
    class ExternalEvent:
        def __init__(self, a: SimpleNamespace) -> None:
            self.recorded = False
            self.early = False
            """Recorded again while it still let waits pass; what came between may not be through."""

        def record(self, a: SimpleNamespace) -> None:
            if world.capturing is not None:
                raise NotImplementedError("this stand-in knows no events that a graph records")
            if self.recorded:
                self.early = True
                (a.stream or world.current()).unsettled.append(self)
            self.recorded = True

        def wait(self, a: SimpleNamespace) -> None:
            now_or_later(a.stream, self.waits)

        def reset(self, a: SimpleNamespace) -> None:
            now_or_later(a.stream, self.resets)

        def waits(self) -> None:
            if not self.recorded:
                raise Misuse("waits for ever: this external event was not recorded since its last reset")
            if self.early:
                raise Misuse("passes too early: this external event was recorded before the update it stands for")

        def resets(self) -> None:
            self.recorded = False

    def now_or_later(stream: Any, what: Callable[[], None]) -> None:
        recorder = world.capturing
        if recorder is not None and stream in (None, recorder.stream):
            recorder.nodes.append(what)
        else:
            what()

    return ExternalEvent


def graph_class(world: World) -> type:
    class NPUGraph:
        recorder: Recorder | None

        def __init__(self, a: SimpleNamespace) -> None:
            self.recorder = None

        def capture_begin(self, a: SimpleNamespace) -> None:
            if world.recorder is not None:
                raise Refused("capture_begin: a capture is under way")
            self.recorder = world.recorder = Recorder(world.current())
            self.recorder.__enter__()

        def capture_end(self, a: SimpleNamespace) -> None:
            assert self.recorder is not None
            self.recorder.__exit__(None, None, None)
            world.recorder = None

        def replay(self, a: SimpleNamespace) -> None:
            if self.recorder is None:
                raise Refused("replay: nothing was captured")
            for node in self.recorder.nodes:
                node()
            world.running[self.recorder] = world.current(self.recorder.stream.device)

        def reset(self, a: SimpleNamespace) -> None:
            self.recorder = None

    return NPUGraph


def context_class(world: World) -> type:
    class graph:  # noqa: N801 (the vendor's name)
        def __init__(self, a: SimpleNamespace) -> None:
            self.npu_graph = a.npu_graph
            self.stream = a.stream or world.Stream(SimpleNamespace(device=None))
            self.within = world.on(self.stream)

        def __enter__(self, a: SimpleNamespace) -> None:
            self.within.__enter__()
            home, world.home = world.home, str(self.stream.device)
            self.npu_graph.capture_begin()
            world.home = home

        def __exit__(self, a: SimpleNamespace) -> None:
            self.npu_graph.capture_end()
            self.within.__exit__(None, None, None)

    return graph
