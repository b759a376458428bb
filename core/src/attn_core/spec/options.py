"""What the engine pins and needs. ``None`` always means: you choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from attn_core.errors import BadInputError
from attn_core.spec import check
from attn_core.spec.fields import GRAPHS

BackendPin = str | Mapping[str, str] | None

ALIASES = {"nsa": "dsa"}
"""Other names under which engines know a backend (SGLang's first name for DeepSeek's sparse attention) -> ours."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Pins (honoured or refused, never changed) and needs of the engine."""

    page_size: int | None = None
    kv_cache_dtype: str | None = None
    kv_layout: str | None = None
    graph: str | None = None
    backend: BackendPin = None
    """A backend name for every attention role, or ``{group: name}``."""
    prefill_backend: BackendPin = None
    decode_backend: BackendPin = None
    uniform: str = "none"
    """For engines that cannot mix: ``groups`` (one backend per role), ``all`` (one backend in all)."""
    deterministic: bool = False
    lse: bool = False
    verify_width: int = 1
    tree_mask: bool = False
    host_lengths: str = "exact"
    tensor_parallel: int = 1
    world_size: int = 0
    """0 means ``tensor_parallel``."""
    kv_offload_io: str = "none"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    allow_reference: bool = False
    deny: tuple[str, ...] = ()
    """Backend names that must not be chosen."""

    def __post_init__(self) -> None:
        where = "EngineOptions"
        put = object.__setattr__
        check.size(where, "page_size", self.page_size, optional=True)
        if self.kv_cache_dtype is not None:
            check.choice(where, "kv_cache_dtype", self.kv_cache_dtype, check.KV_CACHE_DTYPES)
            if self.kv_cache_dtype == "auto":
                put(self, "kv_cache_dtype", None)
        if self.graph is not None:
            check.choice(where, "graph", self.graph, GRAPHS)
        if self.kv_layout is not None and not (isinstance(self.kv_layout, str) and self.kv_layout):
            raise BadInputError(f"{where}: kv_layout={self.kv_layout!r} must be a layout name or None")
        check.choice(where, "uniform", self.uniform, ("none", "groups", "all"))
        check.choice(where, "host_lengths", self.host_lengths, ("exact", "bounds"))
        check.choice(where, "kv_offload_io", self.kv_offload_io, ("none", "kernel", "direct"))
        for name in ("deterministic", "lse", "tree_mask", "allow_reference"):
            check.flag(where, name, getattr(self, name))
        check.size(where, "verify_width", self.verify_width)
        check.size(where, "tensor_parallel", self.tensor_parallel)
        check.size(where, "world_size", self.world_size, least=0)
        put(self, "world_size", self.world_size or self.tensor_parallel)
        if self.world_size % self.tensor_parallel:
            raise BadInputError(
                f"{where}: world_size={self.world_size} is not a multiple of tensor_parallel={self.tensor_parallel}"
            )
        check.size(where, "max_model_len", self.max_model_len, optional=True)
        check.size(where, "max_num_seqs", self.max_num_seqs, optional=True)
        given: Any = self.deny
        deny = (given,) if isinstance(given, str) else tuple(given)
        put(self, "deny", tuple(sorted({ALIASES.get(name, name) for name in deny})))
        for name in ("backend", "prefill_backend", "decode_backend"):
            pin = getattr(self, name)
            if isinstance(pin, Mapping):
                put(self, name, {group: ALIASES.get(x, x) for group, x in sorted(pin.items())})
            elif pin is not None and not (isinstance(pin, str) and pin):
                raise BadInputError(
                    f"{where}: {name}={pin!r} must be a backend name, a {{group: name}} mapping or None"
                )
            elif pin in ALIASES:
                put(self, name, ALIASES[pin])

    def __hash__(self) -> int:
        return hash(tuple(str(getattr(self, f.name)) for f in fields(self)))

    @classmethod
    def of(cls, **options: Any) -> EngineOptions:
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise BadInputError(f"unknown option {name!r}{check.nearest(name, known)}; known: {', '.join(known)}")
        return cls(**options)

    def facts(self) -> dict[str, object]:
        """Engine-scope facts that backends are judged on."""
        names = (
            "deterministic", "lse", "verify_width", "tree_mask", "host_lengths", "tensor_parallel", "world_size",
            "kv_offload_io", "max_model_len", "max_num_seqs",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def pins(self) -> dict[str, object]:
        """Everything the user set: fields that differ from their default."""
        default = EngineOptions()
        out = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)}
        if self.world_size == self.tensor_parallel:
            out.pop("world_size", None)
        return out

    def without(self, name: str) -> EngineOptions:
        """These options with one pin taken back."""
        changed: dict[str, Any] = {name: getattr(EngineOptions(), name)}
        if self.world_size == self.tensor_parallel or name == "tensor_parallel":
            changed["world_size"] = 0
        return replace(self, **changed)

    def pinned_backend(self, group: str, role: str) -> str | None:
        """The name the user pinned for this role of this group, most specific first."""
        by_role = {"prefill": self.prefill_backend, "decode": self.decode_backend}.get(role)
        if role.startswith("linear_") or role in ("kv_write", "allreduce_fusion"):
            return None
        for pin in (by_role, self.backend):
            if isinstance(pin, Mapping):
                if group in pin:
                    return pin[group]
            elif pin is not None:
                return pin
        return None

    def to_json(self) -> dict[str, object]:
        out: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineOptions:
        return cls.of(**{**data, "deny": tuple(data.get("deny", ()))})
