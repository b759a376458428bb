"""attn-core: with which attention kernels shall this model run on this hardware?

    from attn_core import ModelSpec, get_platform

    model = ModelSpec.from_hf_config("config.json")
    attn = get_platform().attention_backend(model)      # raises NoBackendError with reasons
    print(attn.decision.explain())

Importing this package imports no torch and initialises no device. What an engine
needs at run time, and with it torch, loads when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attn_core.domain import ANY, MultipleOf, NoneOf, OneOf
from attn_core.errors import AttnCoreError, BadInputError, BindError, MissingKernelError, NoBackendError
from attn_core.hookspecs import hookimpl
from attn_core.spec import (
    AttentionSpec,
    BackendSpec,
    Constraint,
    Decision,
    Device,
    EngineOptions,
    LinearSpec,
    ModelSpec,
    PlatformSpec,
    Requirement,
    Tier,
)

if TYPE_CHECKING:
    from attn_core.platform import Platform, get_platform, simulate
    from attn_core.runtime import (
        AttentionBackend,
        Batch,
        Binding,
        Capture,
        Kernels,
        KVCache,
        merge_state,
        wrap_kv_cache,
    )

_LATER = {
    **dict.fromkeys(("Platform", "get_platform", "simulate"), "attn_core.platform"),
    **dict.fromkeys(
        ("AttentionBackend", "Batch", "Binding", "Capture", "KVCache", "Kernels", "merge_state", "wrap_kv_cache"),
        "attn_core.runtime",
    ),
}
"""Name -> module that is imported when the name is first used; the runtime imports torch."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'attn_core' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ANY",
    "AttentionBackend",
    "AttentionSpec",
    "AttnCoreError",
    "BackendSpec",
    "BadInputError",
    "Batch",
    "BindError",
    "Binding",
    "Capture",
    "Constraint",
    "Decision",
    "Device",
    "EngineOptions",
    "KVCache",
    "Kernels",
    "LinearSpec",
    "MissingKernelError",
    "ModelSpec",
    "MultipleOf",
    "NoBackendError",
    "NoneOf",
    "OneOf",
    "Platform",
    "PlatformSpec",
    "Requirement",
    "Tier",
    "get_platform",
    "hookimpl",
    "merge_state",
    "simulate",
    "wrap_kv_cache",
]
