"""What a plugin's ``bind`` gets and gives: ``bind(binding) -> Kernels(plan, call)``, or for ``allreduce_fusion``
``bind(AllReduceBinding) -> AllReduceKernel(call, close)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_core.spec import AttentionSpec, Device, EngineOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Binding:
    """One role of one group, decided: all a kernel can know before the first step; nothing is looked up later."""

    backend: str
    role: str
    """``prefill``, ``decode``, ``encode`` or ``kv_write``."""
    form: str | None
    """MLA: ``absorbed`` or ``materialised``; None for MHA."""
    spec: AttentionSpec
    """The group after sharding, in the model's own widths."""
    num_heads: int
    """Query heads as the kernel sees them (after ``pads``)."""
    num_kv_heads: int
    """Key/value heads as the kernel sees them (absorbed MLA: 1)."""
    head_dim: int
    """Width of q and k as the kernel sees them, after padding. The core pads and crops; kernels never do."""
    v_head_dim: int
    """Width of v and of the output as the kernel sees them, after padding."""
    scale: float
    """Multiplies q·k; always from the model's own width, never from the padded one."""
    dtype: torch.dtype
    """dtype of q, k, v and the output."""
    kv_dtype: torch.dtype | None
    """Storage dtype of the cache; None where the group has no cache."""
    kv_cache_dtype: str | None
    """Vocabulary name of the cache dtype (``fp8_e4m3``); None where the group has no cache."""
    kv_layout: str | None
    page_size: int | None
    """Tokens per page; None where the group has no cache."""
    mla_query: str
    """Absorbed MLA: ``packed`` (tokens, heads, latent + rope) or ``split`` (a pair of tensors)."""
    graph: str
    options: EngineOptions
    device: Device
    torch_device: torch.device
    sliding_window: int | None
    """W tokens including the token itself; non-causal: |i - j| < W."""
    alibi_slopes: tuple[float, ...] | None
    """This rank's slopes, one per query head."""


@dataclass(frozen=True)
class Kernels:
    """What ``bind`` returns: two plain functions, specialised for the binding.

    ``plan(batch, *, capture=None, out=None) -> object`` builds (or refills) what this role needs for one step; the
    object is stored on the group's plan under the role's name (``kv_write``: ``plan.write``). ``batch`` holds only this
    role's rows, unless the backend is unified, when it holds all rows. Prefill of form ``materialised`` sees ragged
    keys in memory instead of pages: ``batch.kv_lens`` counts the new tokens; it is bound a second time with a
    non-causal spec (attn_type ``encoder_only``) for chunks of cached context, whose lengths may be 0.

    ``call(q, k, v, kv_cache, plan, *, sinks=None, indices=None, bias=None, out=None, return_lse=False)`` attends;
    ``plan`` is the group's plan, so a decode kernel reads ``plan.decode``. Shapes are packed
    ``(tokens, heads, width)``; q, k and v are often parts of one tensor, so their rows and heads may have gaps between
    them, but no row within. ``out`` has none, unless the kernel claims ``strided_out``. Returns the output, or
    ``(output, lse)``.

    Role ``kv_write``: ``call(k, v, kv_cache, plan)`` writes new keys at the batch's slots; ``gather(kv_cache, plan,
    chunk)`` reads them back as packed rows.
    """

    plan: Callable[..., Any]
    call: Callable[..., Any]
    prepare_sinks: Callable[[Any], Any] | None = None
    """Turns a model's sinks tensor into what ``call`` wants, once per layer; None: float32, contiguous."""
    merge_state: Callable[..., Any] | None = None
    """Joins partial results on this device, with the signature and meaning of ``attn_core.merge_state``; None: that
    one, which is plain torch."""
    gather: Callable[..., Any] | None = None
    """``kv_write`` only."""
    allocate: Callable[..., Any] | None = None
    """``kv_write`` only: ``allocate(num_pages) -> tuple of tensors`` for layouts the core does not know."""


@dataclass(frozen=True, kw_only=True)
class AllReduceBinding:
    """``allreduce_fusion``, decided: all a kernel of that role can know before the first step."""

    backend: str
    dtype: torch.dtype
    rank: int
    """Of ``world_size`` ranks: the tensor-parallel ones, which hold parts of the same layer."""
    world_size: int
    process_group: Any
    """``torch.distributed`` group of those ranks; None: the default group, or with one rank none at all."""
    hidden_size: int
    max_tokens: int
    graph: str
    options: EngineOptions
    device: Device
    torch_device: torch.device


@dataclass(frozen=True)
class AllReduceKernel:
    """What ``bind`` returns for ``allreduce_fusion``.

    ``call(x, residual, weight, eps, out, residual_out)`` writes ``out`` and ``residual_out``, which may be ``residual``
    itself, and may overwrite ``x``. ``close()`` gives back what is shared with other ranks.
    """

    call: Callable[[Any, Any, Any, float, Any, Any], None]
    close: Callable[[], None]
