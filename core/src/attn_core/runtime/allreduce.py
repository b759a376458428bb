"""``allreduce_fusion``, the one role of the whole model: the sum over ranks that ends a sharded layer, the residual and
the normalisation after it, as one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_core.errors import BadInputError
from attn_core.runtime.bind import call_bind
from attn_core.runtime.binding import AllReduceBinding, AllReduceKernel
from attn_core.spec import Decision

ROLE = "allreduce_fusion"


class AllReduceFusion:
    """A bound kernel of the role: every rank calls it in the same order, each with its own part."""

    def __init__(self, binding: AllReduceBinding, kernel: AllReduceKernel) -> None:
        self.binding = binding
        self._call: Callable[..., None] | None = kernel.call
        self._close = kernel.close

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *,
        eps: float, out: torch.Tensor | None = None, residual_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``residual_out = sum of x over ranks + residual``; ``out = residual_out / rms(residual_out) * weight``.

        ``x``, ``residual``, ``out`` and ``residual_out`` are contiguous (tokens, hidden_size) in the bound dtype,
        ``weight`` is (hidden_size,). ``x`` may be overwritten; ``residual_out`` may be ``residual``, ``out`` may be
        ``x``. Returns (out, residual_out). ``rms(v) = sqrt(mean(v^2) + eps)`` along the hidden size.
        Raises :class:`BadInputError`; no rank has been asked for anything then.
        """
        b, call = self.binding, self._call
        if call is None:
            raise BadInputError(f"{ROLE} of {b.backend!r} is closed; ask attention_backend().allreduce_fusion() anew")
        shape, device = torch.Size((x.shape[0] if x.ndim else 0, b.hidden_size)), x.device
        _check(b, "x", x, shape, b.torch_device if device.type != b.torch_device.type else device)
        if x.shape[0] > b.max_tokens:
            raise BadInputError(f"{ROLE}: {x.shape[0]} tokens, bound for max_tokens={b.max_tokens}; bind for more")
        out = torch.empty_like(x) if out is None else out
        residual_out = torch.empty_like(x) if residual_out is None else residual_out
        for name, tensor in (("residual", residual), ("out", out), ("residual_out", residual_out)):
            _check(b, name, tensor, shape, device)
        _check(b, "weight", weight, shape[1:], device)
        if out.data_ptr() in (residual.data_ptr(), residual_out.data_ptr()) and x.shape[0]:
            raise BadInputError(f"{ROLE}: out must be memory of its own, or x; residual and residual_out are kept")
        if x.shape[0]:
            call(x, residual, weight, eps, out, residual_out)
        return out, residual_out

    def close(self) -> None:
        """Give back what ranks share, on every rank, and let nobody call again. A second time does nothing."""
        if self._call is not None:
            self._call = None
            self._close()

    def __enter__(self) -> AllReduceFusion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        b = self.binding
        return f"AllReduceFusion({b.backend}, rank {b.rank} of {b.world_size}, hidden_size={b.hidden_size})"


def bind_allreduce(
    decision: Decision, torch_device: torch.device, *,
    rank: int, process_group: Any, hidden_size: int, max_tokens: int, dtype: torch.dtype,
) -> AllReduceFusion:  # fmt: skip
    """Bind the backend that was decided. Raises :class:`BindError`, the plugin's :class:`MissingKernelError`, or
    :class:`BadInputError` where the sizes or the process group are not what was decided for."""
    for name, value in (("hidden_size", hidden_size), ("max_tokens", max_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInputError(f"{ROLE}: {name}={value!r} is not accepted; accepted: a whole number from 1 up")
    decided = {str(g.dtype) for g in decision.model.groups.values()}
    if str(dtype).removeprefix("torch.") not in decided:
        raise BadInputError(f"{ROLE}: dtype={dtype} was not decided for; decided for: {', '.join(sorted(decided))}")
    choice, ranks = decision.roles[ROLE], decision.options.tensor_parallel
    _check_group(process_group, rank, ranks)
    binding = AllReduceBinding(
        backend=choice.backend, dtype=dtype, rank=rank, world_size=ranks, process_group=process_group,
        hidden_size=hidden_size, max_tokens=max_tokens, graph=decision.values.get("graph", "none"),
        options=decision.options, device=decision.device, torch_device=torch_device,
    )  # fmt: skip
    kernel = call_bind(choice.bind, binding, f"role {ROLE}", AllReduceKernel)
    return AllReduceFusion(binding, kernel)


def _check(b: AllReduceBinding, name: str, tensor: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    """Kernels go by pointers: what they are given must be what they were bound for."""
    if tensor.shape != shape or tensor.dtype != b.dtype or tensor.device != device or not tensor.is_contiguous():
        raise BadInputError(
            f"{ROLE}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}; "
            f"expected contiguous {b.dtype} {tuple(shape)} on {device}"
        )


def _check_group(group: Any, rank: int, ranks: int) -> None:
    """The group's size and this rank's place in it are the decided ones; one rank needs no group."""
    dist = torch.distributed
    if ranks == 1 and group is None:
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise BadInputError(
            f"{ROLE}: {ranks} tensor-parallel ranks, but torch.distributed is not initialised; call "
            "init_process_group, or pass the engine's process group"
        )
    size, place = dist.get_world_size(group), dist.get_rank(group)
    if (size, place) != (ranks, rank):
        raise BadInputError(
            f"{ROLE}: the process group has {size} ranks and this one is rank {place}; decided for "
            f"tensor_parallel={ranks}, rank {rank}"
        )
