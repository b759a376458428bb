"""One layer's KV cache: tensors, the name of their layout, and scales in both forms kernels want."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.spec import Device

KV_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "nvfp4": torch.uint8,  # two values a byte; only a vendor's layout can hold its block scales
}
"""Vocabulary name -> storage dtype. ``auto`` is resolved to a name before it gets here."""


def kv_dtype(name: str, device: Device) -> torch.dtype:
    """Storage dtype of a cache; ``fp8_e4m3`` is the FNUZ variant on devices whose instructions read only that."""
    return KV_DTYPES["fp8_e4m3fnuz" if name == "fp8_e4m3" and "fp8_fnuz" in device.isa else name]


@dataclass(frozen=True)
class Sizes:
    """What a layout's shapes are made of: the widths as the kernels see them, after padding."""

    page_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    latent_dim: int = 0
    rope_dim: int = 0


@dataclass(frozen=True)
class Layout:
    """A layout the core can allocate itself."""

    axes: tuple[str, ...]
    """Axes of each tensor; ``page`` is the place inside a page. Only the last may differ between tensors."""
    tensors: int
    shapes: Callable[[Sizes, int], tuple[tuple[int, ...], ...]]
    """Shapes of the tensors for so many pages."""


LAYOUTS: dict[str, Layout] = {
    "NHD": Layout(
        ("pages", "page", "heads", "width"),
        2,
        lambda s, n: tuple((n, s.page_size, s.num_kv_heads, d) for d in (s.head_dim, s.v_head_dim)),
    ),
    "HND": Layout(
        ("pages", "heads", "page", "width"),
        2,
        lambda s, n: tuple((n, s.num_kv_heads, s.page_size, d) for d in (s.head_dim, s.v_head_dim)),
    ),
    "MLA": Layout(
        ("pages", "page", "width"),
        1,
        lambda s, n: ((n, s.page_size, s.latent_dim + s.rope_dim),),
    ),
    "MLA_SPLIT": Layout(
        ("pages", "page", "width"),
        2,
        lambda s, n: tuple((n, s.page_size, d) for d in (s.latent_dim, s.rope_dim)),
    ),
}
"""Every other layout belongs to its writer: ``Kernels.allocate`` makes it, and only its kernels look inside."""


@dataclass(frozen=True, eq=False, kw_only=True)
class KVCache:
    """One layer's cache. Page 0 is the null page: zeros, never handed out; padding rows point at it.

    A stored value times its scale is the true value; scales are 1.0 unless the cache is quantised (``fp8``, ``int8``).
    Make one by :func:`wrap_kv_cache` or a group's ``new_kv_cache``: they make both forms of the scales, once.
    """

    data: tuple[Tensor, ...]
    """NHD ``(k, v)`` of ``(num_pages, page_size, num_kv_heads, width)``; HND with heads before page; MLA one tensor
    ``(num_pages, page_size, latent + rope)``; MLA_SPLIT ``(latent, rope)``; others as their writer made them."""
    layout: str
    page_size: int
    k_scale_t: Tensor
    """float32 on the cache's device, ``()``, or ``(num_kv_heads,)`` for scales per head."""
    v_scale_t: Tensor
    scales: tuple[float | None, float | None] = (1.0, 1.0)
    """(k, v) scales on the host; None where they are per head."""
    num_pages: int = field(init=False)
    """Pages, the null page included: the first axis of the first tensor in every layout."""
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    """What kernels derive from this cache and want once, not per call (views in their own shape); keyed by backend."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_pages", self.data[0].shape[0])

    @property
    def k_scale(self) -> float:
        """Scale of k on the host. Raises :class:`AttnCoreError` where scales are per head: read ``k_scale_t`` then."""
        return self._scale("k", self.scales[0])

    @property
    def v_scale(self) -> float:
        """Scale of v on the host, as :attr:`k_scale`."""
        return self._scale("v", self.scales[1])

    def _scale(self, name: str, value: float | None) -> float:
        if value is None:
            raise AttnCoreError(f"KVCache.{name}_scale is per head and has no single value; read {name}_scale_t")
        return value

    @cached_property
    def k(self) -> Tensor:
        """View ``(num_pages, page_size, num_kv_heads, head_dim)``; NHD and HND only, others raise AttnCoreError."""
        return self._view("k", 0)

    @cached_property
    def v(self) -> Tensor:
        """View ``(num_pages, page_size, num_kv_heads, v_head_dim)``; NHD and HND only, others raise AttnCoreError."""
        return self._view("v", 1)

    def _view(self, name: str, index: int) -> Tensor:
        if self.layout not in ("NHD", "HND"):
            raise AttnCoreError(
                f"KVCache.{name}: layout {self.layout!r} has no such view (only NHD and HND do); "
                "read it through gather_kv or the backend that wrote it"
            )
        tensor = self.data[index]
        return tensor if self.layout == "NHD" else tensor.transpose(1, 2)


def wrap_kv_cache(
    *tensors: Tensor,
    layout: str,
    page_size: int | None = None,
    k_scale: float | Tensor = 1.0,
    v_scale: float | Tensor = 1.0,
) -> KVCache:
    """An engine's own cache tensors as a :class:`KVCache`, without a copy; strided views are welcome.

    ``page_size`` is read from the shape of layouts the core knows and must be given for others. Scales are numbers or
    tensors, ``()`` or ``(num_kv_heads,)``. The engine keeps page 0 zeroed. Raises :class:`BadInputError`.
    """
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise BadInputError("wrap_kv_cache: give the cache tensors first, e.g. wrap_kv_cache(k, v, layout='NHD')")
    first = tensors[0]
    if any((t.device, t.dtype) != (first.device, first.dtype) for t in tensors[1:]) and layout in LAYOUTS:
        raise BadInputError("wrap_kv_cache: the cache tensors differ in device or dtype")
    if layout in LAYOUTS:
        found = _page_size(layout, tensors)
        if page_size not in (None, found):
            raise BadInputError(f"wrap_kv_cache: page_size={page_size}, but the {layout} tensors have pages of {found}")
        page_size = found
    if page_size is None:
        raise BadInputError(f"wrap_kv_cache: layout {layout!r} is its backend's own; give page_size")
    k, k_t = _both(k_scale, "k_scale", first.device)
    v, v_t = _both(v_scale, "v_scale", first.device)
    return KVCache(data=tensors, layout=layout, page_size=page_size, k_scale_t=k_t, v_scale_t=v_t, scales=(k, v))


def _page_size(layout: str, tensors: tuple[Tensor, ...]) -> int:
    axes, count = LAYOUTS[layout].axes, LAYOUTS[layout].tensors
    if len(tensors) != count:
        raise BadInputError(f"wrap_kv_cache: layout {layout} has {count} tensor(s), got {len(tensors)}")
    for t in tensors:
        if t.dim() != len(axes) or t.shape[:-1] != tensors[0].shape[:-1] or t.stride(-1) != 1:
            raise BadInputError(
                f"wrap_kv_cache: layout {layout} is ({', '.join(axes)}), the last axis contiguous, the others equal in "
                f"all tensors; got {[tuple(x.shape) for x in tensors]} with strides {[x.stride() for x in tensors]}"
            )
    return tensors[0].shape[axes.index("page")]


def _both(scale: float | Tensor, name: str, device: torch.device) -> tuple[float | None, Tensor]:
    """A scale as a host number (None when per head) and as a float32 tensor on the device."""
    tensor = torch.as_tensor(scale, dtype=torch.float32)
    if tensor.dim() > 1 or not tensor.numel() or not bool((tensor > 0).all()):
        raise BadInputError(f"wrap_kv_cache: {name}={scale!r} must be a positive number, or one per key/value head")
    if tensor.numel() == 1 and tensor.dim() == 0:
        return float(tensor), tensor.to(device)
    return None, tensor.to(device)
