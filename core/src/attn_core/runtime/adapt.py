"""Wrappers between the engine's call and a kernel that is wider, pickier or unable to fill ``out=``.

Each is a closure made once at bind. A kernel that needs none of them is handed out as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

Attend = Callable[..., Any]
"""``(q, k, v, kv_cache, plan, *, sinks, indices, bias, out, return_lse)``, see :class:`Kernels`."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A group's sizes as the model has them and as one kernel wants them. Heads grow inside each kv head's group."""

    kv_heads: int
    group: int
    kernel_group: int
    head_dim: int
    kernel_head_dim: int
    v_head_dim: int
    kernel_v_head_dim: int

    @property
    def more_heads(self) -> int:
        return self.kernel_group - self.group

    @property
    def more_width(self) -> int:
        return self.kernel_head_dim - self.head_dim

    @property
    def more_v_width(self) -> int:
        return self.kernel_v_head_dim - self.v_head_dim

    def grow_heads(self, x: Tensor, dim: int, more_width: int = 0) -> Tensor:
        """``x`` with zero heads at the end of each group along ``dim``, and zero columns at the end of the last."""
        grouped = x.reshape(*x.shape[:dim], self.kv_heads, self.group, *x.shape[dim + 1 :])
        after = grouped.dim() - dim - 2  # axes behind the group axis
        amounts = [0] * (2 * after) + [0, self.more_heads]
        if more_width:
            amounts[1] = more_width
        return pad(grouped, amounts).flatten(dim, dim + 1)

    def crop_heads(self, x: Tensor) -> Tensor:
        """The model's heads of ``(tokens, kernel heads, ...)``."""
        grouped = x.reshape(x.shape[0], self.kv_heads, self.kernel_group, *x.shape[2:])
        return grouped[:, :, : self.group].flatten(1, 2)


def widen(more: int) -> Callable[[Tensor | None], Tensor | None]:
    """Adds ``more`` columns of zeros to a tensor; keeps None."""

    def wider(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad(x, (0, more))

    return wider if more else _same


def _same(x: Any) -> Any:
    return x


def fitted(call: Attend, fit: Fit, claims: Collection[str], *, reads_kv: bool) -> Attend:
    """``call`` as the engine may call it: padded inputs, cropped outputs, ``out=`` honoured whatever its strides.

    Zeros change no score and the columns they add to the output are cut off. ``reads_kv``: the kernel looks at k and v
    and not only at the cache.
    """
    inner = call if not (fit.more_heads or fit.more_width) else _with_wider_inputs(call, fit, reads_kv=reads_kv)
    if fit.more_heads or fit.more_v_width:
        return _with_cropped_output(inner, fit)
    if "strided_out" in claims:
        return inner
    return _with_packed_out(inner) if "native_out" in claims else _with_out(inner)


def _with_wider_inputs(call: Attend, fit: Fit, *, reads_kv: bool) -> Attend:
    more, widen_q = fit.more_width, widen(fit.more_width)

    def grow_q(q: Any) -> Any:
        return tuple(fit.grow_heads(part, 1) for part in q) if isinstance(q, tuple) else fit.grow_heads(q, 1, more)

    def grow_bias(bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or bias.shape[1] == 1 else fit.grow_heads(bias, 1)

    wider_q = grow_q if fit.more_heads else widen_q
    wider_bias = grow_bias if fit.more_heads else _same
    wider_k = widen(more) if reads_kv else _same
    wider_v = widen(fit.more_v_width) if reads_kv else _same

    def attend(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        return call(
            wider_q(q), wider_k(k), wider_v(v), kv_cache, plan,
            sinks=sinks, indices=indices, bias=wider_bias(bias), out=out, return_lse=return_lse,
        )  # fmt: skip

    return attend


def _with_cropped_output(call: Attend, fit: Fit) -> Attend:
    width, heads = fit.v_head_dim, fit.more_heads

    def crop(o: Tensor) -> Tensor:
        return fit.crop_heads(o[..., :width]) if heads else o[..., :width]

    def attend(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        got = call(q, k, v, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, return_lse=return_lse)
        if not return_lse:
            return crop(got) if out is None else out.copy_(crop(got))
        o, lse = crop(got[0]), fit.crop_heads(got[1]) if heads else got[1]
        return (o if out is None else out.copy_(o)), lse

    return attend


def _with_out(call: Attend) -> Attend:
    def attend(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        got = call(q, k, v, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, return_lse=return_lse)
        if out is None:
            return got
        if return_lse:
            return out.copy_(got[0]), got[1]
        return out.copy_(got)

    return attend


def _with_packed_out(call: Attend) -> Attend:
    """Many kernels take the strides of ``out`` from its shape: one with gaps would be filled in the wrong places."""
    copying = _with_out(call)

    def attend(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        fill = call if out is None or out.is_contiguous() else copying
        return fill(q, k, v, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, out=out, return_lse=return_lse)

    return attend


def write_fitted(call: Callable[..., Any], fit: Fit) -> Callable[..., Any]:
    """``write_kv`` into a cache wider than the model's k and v."""
    if not (fit.more_width or fit.more_v_width):
        return call
    wider_k, wider_v = widen(fit.more_width), widen(fit.more_v_width)

    def write_kv(k: Any, v: Any, kv_cache: Any, plan: Any) -> None:
        call(wider_k(k), wider_v(v), kv_cache, plan)

    return write_kv


def gather_fitted(call: Callable[..., Any], fit: Fit) -> Callable[..., Any]:
    """``gather_kv`` from a cache wider than the model's k and v."""
    if not (fit.more_width or fit.more_v_width):
        return call

    def gather_kv(kv_cache: Any, plan: Any, chunk: Any) -> tuple[Tensor, Tensor]:
        k, v = call(kv_cache, plan, chunk)
        return k[..., : fit.head_dim], v[..., : fit.v_head_dim]

    return gather_kv
