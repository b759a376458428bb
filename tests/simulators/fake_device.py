"""Accelerators that are not there: tensors that say they lie on ``cuda:1`` and hold their numbers on the CPU.

Within :func:`devices` every operation on such tensors runs on the CPU and answers on the same device. As on a real one,
tensors of different devices do not mix (but for zero-dimensional CPU tensors), and reading one on the host waits: what
waits is recorded, except where a stand-in reads to compute its answer (:func:`unrecorded`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, Tensor.copy_}
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}
ON_HOST = {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__}
"""Functions that read on the host."""
MOVES = {Tensor.to, Tensor.cpu}


class OnDevice(Tensor):
    """A tensor on a fake device; ``numbers`` holds its numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=device, requires_grad=False,
        )  # fmt: skip
        made.numbers = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"{self.device}:{self.numbers!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, None)


class Factories(TorchFunctionMode):
    """Answers for functions that name a fake device, before torch tries to initialise it."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ == "__get__":
            return func(*args, **kwargs)
        if func in ON_HOST and isinstance(args[0], OnDevice):
            return func(args[0].cpu(), *args[1:], **kwargs)
        if func not in MOVES and any(isinstance(a, OnDevice) for a in tree_flatten((args, kwargs))[0]):
            return run(func, args, kwargs, None)  # here already: torch would ask the device's runtime next
        named = [*args, *kwargs.values()] if func is Tensor.to else [kwargs.get("device")]
        places = [d for d in map(_device, named) if d is not None and d.type in self.kinds]
        if not places:
            return func(*args, **kwargs)
        (place,) = places
        args = tuple(torch.device("cpu") if _device(a) == place else a for a in args)
        kwargs = {k: torch.device("cpu") if _device(v) == place else v for k, v in kwargs.items()}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        with unrecorded():
            made = func(*args, **kwargs)
        if isinstance(source, OnDevice) and source.device == place and func is Tensor.to and made.dtype == source.dtype:
            return source
        return OnDevice(made, place)


def _device(x: Any) -> torch.device | None:
    if isinstance(x, torch.device):
        return x
    try:
        return torch.device(x) if isinstance(x, str) else None
    except RuntimeError:
        return None


class Recorder(TorchDispatchMode):
    """Lists the operations that waited for a fake device."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        self.waits: list[str] = []
        self.quiet = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self)


def run(func: Any, args: Any, kwargs: dict[str, Any], recorder: Recorder | None) -> Any:
    recorder = recorder or _current()
    flat, spec = tree_flatten((args, kwargs))
    mine = [t for t in flat if isinstance(t, OnDevice)]
    plain = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, OnDevice)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    faked = target is not None and recorder is not None and target.type in recorder.kinds
    if not mine and not faked:
        return func(*args, **kwargs)
    places = {t.device for t in mine}
    if func not in COPIES and (len(places) > 1 or (places and any(t.dim() for t in plain))):
        found = sorted({str(t.device) for t in (*mine, *plain)})
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {', '.join(found)} ({func})")
    args, kwargs = tree_unflatten([t.numbers if isinstance(t, OnDevice) else t for t in flat], spec)
    if target is not None:
        kwargs["device"] = torch.device("cpu") if faked or target.type == "cpu" else target
    to_host = (target is not None and target.type == "cpu") or (
        func in (torch.ops.aten.copy_.default, Tensor.copy_) and not isinstance(flat[0], OnDevice)
    )
    if recorder is not None and not recorder.quiet and mine and (func in READS or to_host):
        recorder.waits.append(str(func))
    out = func(*args, **kwargs)
    if to_host:
        return out
    device = target if faked else next(iter(places))
    back = {id(t.numbers): t for t in mine}

    def wrap(x: Any) -> Any:
        return back.get(id(x)) if id(x) in back else OnDevice(x, device) if isinstance(x, Tensor) else x

    return tree_map(wrap, out)


def _current() -> Recorder | None:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((m for m in reversed(stack) if isinstance(m, Recorder)), None)


@contextmanager
def devices(*kinds: str) -> Iterator[Recorder]:
    """Within: ``torch.zeros(3, device="cuda:1")`` and its like work for these kinds of device. Yields the recorder."""
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, where torch has no CUDA
    recorder = Recorder(kinds or ("cuda",))
    with Factories(recorder.kinds), recorder:
        yield recorder


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within: reading a fake device is a stand-in's business."""
    recorder = _current()
    if recorder is not None:
        recorder.quiet += 1
    try:
        yield
    finally:
        if recorder is not None:
            recorder.quiet -= 1
