"""What ``attention_backend()`` returns: a decision with its groups bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from attn_core.errors import AttnCoreError, BadInputError, BindError
from attn_core.runtime.adapt import Attend
from attn_core.runtime.allreduce import AllReduceFusion, bind_allreduce
from attn_core.runtime.bound import DELEGATED, BoundGroup, bind_group
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Plan
from attn_core.spec import AttentionSpec, Decision


class SeveralGroupsError(AttnCoreError, AttributeError):
    """A function was asked of the whole model, but each of its groups has its own."""


class AttentionBackend:
    """Bound kernels of a model. ``groups`` holds them by name; with one bound group its functions are also attributes
    here, the very same objects. With several, ``plan``, ``forward`` and the like raise :class:`SeveralGroupsError`:
    windows, slots and metadata differ per group, so each is planned by itself.

    Linear-attention groups are decided but not bound: the engine runs them.
    """

    plan: Callable[..., Plan]
    forward: Attend
    prefill: Attend
    decode: Attend
    encode: Attend
    write_kv: Callable[..., None]
    gather_kv: Callable[..., Any]
    prefill_with_context: Callable[..., Any]
    prepare_sinks: Callable[[Any], Any]
    new_kv_cache: Callable[..., KVCache]
    merge_state: Callable[..., Any]

    def __init__(self, *, decision: Decision, groups: Mapping[str, BoundGroup], rank: int = 0) -> None:
        if not groups:
            raise BindError("AttentionBackend: the model has no attention group to bind; the engine runs all of it")
        self.decision = decision
        self.rank = rank
        self.groups: Mapping[str, BoundGroup] = MappingProxyType(dict(groups))
        for name, group in self.groups.items():
            _check_shared_cache(name, group, self.groups)
        if len(self.groups) == 1:
            (only,) = self.groups.values()
            for name in DELEGATED:
                setattr(self, name, getattr(only, name))

    def group_of(self, layer: int) -> BoundGroup:
        """The group that a decoder layer's attention belongs to.

        Raises :class:`BadInputError` for a layer of no group, or of a linear group, which has no kernels here.
        """
        name = self.decision.model.group_of(layer)
        if name not in self.groups:
            raise BadInputError(
                f"layer {layer} belongs to group {name!r}, which the engine runs itself; bound here: "
                f"{', '.join(self.groups)}"
            )
        return self.groups[name]

    def allreduce_fusion(
        self, process_group: Any = None, *, hidden_size: int, max_tokens: int, dtype: torch.dtype | None = None
    ) -> AllReduceFusion:
        """Bind the model's ``allreduce_fusion``: all-reduce, residual and RMS norm, with memory that ranks share.

        ``process_group``: the tensor-parallel ranks (None: torch's default group; with one rank none is needed). Every
        rank calls this, for steps of up to ``max_tokens`` rows of ``hidden_size`` in ``dtype`` (None: the first
        group's). Close what is returned, on every rank, before the process group goes away.
        Raises :class:`BindError`, :class:`MissingKernelError` and :class:`BadInputError`.
        """
        first = next(iter(self.groups.values()))
        return bind_allreduce(
            self.decision, first.torch_device, rank=self.rank, process_group=process_group, hidden_size=hidden_size,
            max_tokens=max_tokens, dtype=getattr(torch, first.spec.dtype) if dtype is None else dtype,
        )  # fmt: skip

    def __getattr__(self, name: str) -> NoReturn:
        """Only reached for names that are not set."""
        if name in DELEGATED and "groups" in self.__dict__:
            raise SeveralGroupsError(
                f"this model has {len(self.groups)} attention groups ({', '.join(self.groups)}), each with its own "
                f"{name}; use attn.group_of(layer).{name} or attn.groups[name].{name}"
            )
        raise AttributeError(f"AttentionBackend has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"AttentionBackend({', '.join(map(repr, self.groups.values()))})"


def bind_decision(decision: Decision, torch_device: str, *, rank: int = 0) -> AttentionBackend:
    """Bind every softmax-attention group of a decision on one torch device; linear groups stay with the engine.

    ``rank`` is the tensor-parallel rank: it picks this rank's alibi slopes. Raises :class:`BindError`, or the plugin's
    :class:`MissingKernelError` with ``backend`` filled in.
    """
    options, ranks = decision.options, decision.options.tensor_parallel
    if not 0 <= rank < ranks:
        raise BadInputError(f"rank={rank} is not one of the {ranks} tensor-parallel ranks")
    groups = {}
    for name, chosen in decision.groups.items():
        whole = decision.model.groups[name]
        if not isinstance(whole, AttentionSpec):
            continue
        spec = whole.sharded(ranks)
        slopes = None
        if whole.alibi_slopes is not None:
            slopes = whole.alibi_slopes[rank * spec.num_heads : (rank + 1) * spec.num_heads]
        shared = {k: v for k, v in decision.values.items() if whole.cached or k == "graph"}
        values = {**shared, **chosen.values}
        if values.get("kv_cache_dtype") == "auto":
            values["kv_cache_dtype"] = spec.dtype
        device = decision.device_of(next(iter(chosen.choices)))
        groups[name] = bind_group(
            name, spec, chosen.choices, values, options, device, torch.device(torch_device), alibi_slopes=slopes
        )
    return AttentionBackend(decision=decision, groups=groups, rank=rank)


def _check_shared_cache(name: str, group: BoundGroup, groups: Mapping[str, BoundGroup]) -> None:
    """A group that reads another's cache must see it as its owner wrote it."""
    owner = None if group.spec.kv_from is None else groups.get(group.spec.kv_from)
    if owner is not None and owner.cache_signature != group.cache_signature:
        raise BindError(
            f"group {name!r} reads the cache of {owner.name!r}; they differ in (layout, page_size, dtype, (kv heads, "
            f"widths)): {group.cache_signature} and {owner.cache_signature}"
        )
