"""From a decision's choice to kernels: build the Binding, import what ``bind`` names, call it, check what came back."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import reduce
from typing import Any, Protocol, TypeVar

import torch

from attn_core.errors import BindError, MissingKernelError
from attn_core.runtime.adapt import Fit
from attn_core.runtime.binding import AllReduceBinding, AllReduceKernel, Binding, Kernels
from attn_core.runtime.cache import kv_dtype
from attn_core.spec import AttentionSpec, Device, EngineOptions

B = TypeVar("B", Binding, AllReduceBinding)
K = TypeVar("K", Kernels, AllReduceKernel)


class Choice(Protocol):
    """What binding needs of a decision's choice for one role."""

    @property
    def backend(self) -> str: ...
    @property
    def bind(self) -> str | None:
        """``module:function``; None: run by the engine."""

    @property
    def form(self) -> str | None: ...
    @property
    def unified(self) -> bool: ...
    @property
    def head_dim(self) -> int | None:
        """Width of q and k in the kernel, after padding; None: the model's."""

    @property
    def num_heads(self) -> int | None:
        """Query heads in the kernel, after padding; None: the model's."""

    @property
    def claims(self) -> Collection[str]:
        """Of ``appends``, ``native_out`` and ``strided_out``."""


@dataclass(frozen=True, kw_only=True)
class GroupFacts:
    """What all roles of one group have in common when they are bound."""

    name: str
    spec: AttentionSpec
    values: Mapping[str, Any]
    options: EngineOptions
    device: Device
    torch_device: torch.device
    alibi_slopes: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One role, bound."""

    binding: Binding
    kernels: Kernels
    fit: Fit
    claims: frozenset[str]


def bind_roles(facts: GroupFacts, choices: Mapping[str, Choice]) -> dict[str, Bound]:
    """Role -> what was bound; ``prefill`` and ``decode`` are one object when a unified kernel serves both.

    A group with ``kv_from`` binds no writer. Raises :class:`BindError`, or :class:`MissingKernelError` untouched.
    """
    spec, bound = facts.spec, dict[str, Bound]()
    pair = [choices[r] for r in ("decode", "prefill") if r in choices]
    unified = len(pair) == 2 and all(c.unified for c in pair) and len({(c.backend, c.bind) for c in pair}) == 1
    for role in ("encode", "decode", "prefill", "kv_write"):
        if role not in choices or role not in spec.roles or (role == "kv_write" and spec.kv_from is not None):
            continue
        bound[role] = bound["decode"] if unified and role == "prefill" else bind_role(facts, role, choices[role])
    if not bound.keys() & {"encode", "decode", "prefill"}:
        raise BindError(f"group {facts.name!r}: no attention role was decided, only {', '.join(choices) or 'nothing'}")
    return bound


def bind_role(facts: GroupFacts, role: str, choice: Choice) -> Bound:
    """Bind one role. Raises :class:`BindError`, or :class:`MissingKernelError` untouched."""
    binding, fit = make_binding(facts, role, choice)
    kernels = call_bind(choice.bind, binding, f"role {role}, group {facts.name!r}", Kernels)
    return Bound(binding=binding, kernels=kernels, fit=fit, claims=frozenset(choice.claims))


def bind_context(facts: GroupFacts, choice: Choice) -> Bound:
    """Materialised MLA: the prefill kernel once more, for cached context that every new token sees whole.

    Its Binding has role ``prefill`` and form ``materialised`` as before, but the spec of a plain ragged group without
    causality: kind ``mha``, attn_type ``encoder_only``, no cache, no sinks (they belong in one denominator only).
    """
    spec = facts.spec
    plain = replace(
        spec, kind="mha", attn_type="encoder_only", num_kv_heads=spec.num_heads, scale=spec.softmax_scale, sinks=False,
        latent_dim=None, rope_dim=None, nope_dim=None, sparse="none", topk=None,
    )  # fmt: skip
    values = {k: v for k, v in facts.values.items() if k not in ("page_size", "kv_cache_dtype", "kv_layout")}
    return bind_role(replace(facts, spec=plain, values=values), "prefill", choice)


def make_binding(facts: GroupFacts, role: str, choice: Choice) -> tuple[Binding, Fit]:
    """The Binding of one role, and how far the kernel's sizes are from the model's."""
    spec, values = facts.spec, facts.values
    form = choice.form or ("absorbed" if role == "kv_write" and spec.kind == "mla" else None)  # writers hold the latent
    sizes: dict[str, Any] = spec.facts(form)
    heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    d, dv = sizes["head_dim"], sizes["v_head_dim"]
    kernel_d, kernel_heads = choice.head_dim or d, choice.num_heads or heads
    kernel_dv = kernel_d if dv == d else dv  # unequal widths are kernels' own pairs and stay
    if kernel_d < d or kernel_heads < heads or kernel_heads % kv_heads or (kernel_d > d and form == "absorbed"):
        raise BindError(
            f"backend {choice.backend!r}, role {role}, group {facts.name!r}: cannot pad {heads} heads of width {d} "
            f"({kv_heads} kv heads) to {kernel_heads} of {kernel_d}; the row's pads and accepts contradict the model"
        )
    fit = Fit(
        kv_heads=kv_heads, group=heads // kv_heads, kernel_group=kernel_heads // kv_heads,
        head_dim=d, kernel_head_dim=kernel_d, v_head_dim=dv, kernel_v_head_dim=kernel_dv,
    )  # fmt: skip
    slopes = facts.alibi_slopes
    if slopes is not None and fit.more_heads:
        slopes = tuple(fit.grow_heads(torch.tensor(slopes, dtype=torch.float64), 0).tolist())
    cache_dtype = values.get("kv_cache_dtype") if spec.cached else None
    if cache_dtype == "auto":
        cache_dtype = spec.dtype
    binding = Binding(
        backend=choice.backend,
        role=role,
        form=choice.form,
        spec=spec,
        num_heads=kernel_heads,
        num_kv_heads=kv_heads,
        head_dim=kernel_d,
        v_head_dim=kernel_dv,
        scale=values.get("scale", spec.softmax_scale),
        dtype=getattr(torch, spec.dtype),
        kv_dtype=None if cache_dtype is None else kv_dtype(cache_dtype, facts.device),
        kv_cache_dtype=cache_dtype,
        kv_layout=values.get("kv_layout") if spec.cached else None,
        page_size=values.get("page_size") if spec.cached else None,
        mla_query=values.get("mla_query", "packed"),
        graph=values.get("graph", "none"),
        options=facts.options,
        device=facts.device,
        torch_device=facts.torch_device,
        sliding_window=spec.sliding_window,
        alibi_slopes=slopes,
    )
    return binding, fit


def call_bind(reference: str | None, binding: B, where: str, expected: type[K]) -> K:
    """Import ``module:function``, call it with the binding, and check what came back. ``where`` continues the row's
    backend and role in errors."""
    who = f"backend {binding.backend!r}, {where}"
    if reference is None:
        raise BindError(f"{who}: the row names no bind function, so the engine runs it with kernels of its own")
    try:
        module, _, path = reference.partition(":")
        bind = reduce(getattr, path.split("."), importlib.import_module(module))
        kernels = bind(binding)  # type: ignore[operator]
    except MissingKernelError as e:
        e.backend, e.bind = binding.backend, reference
        raise
    except Exception as e:
        raise BindError(f"{who}: bind {reference} failed: {type(e).__name__}: {e}") from e
    if not isinstance(kernels, expected):
        needed = ", ".join(f.name for f in fields(expected) if f.default is MISSING)
        got = type(kernels).__name__
        raise BindError(f"{who}: bind {reference} returned {got}; expected {expected.__name__}({needed})")
    return kernels
