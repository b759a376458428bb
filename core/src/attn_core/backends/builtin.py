"""The accompanying answers every model can have: somebody must write pages, and not fusing is always possible.

Linear attention is decided here and run by the engine's own kernels, so its rows bind nothing and refuse nothing that
is the engine's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attn_core.backends.torch_native.rows import DTYPES, KV_DTYPES
from attn_core.domain import ANY, OneOf
from attn_core.spec import BackendSpec, Device, Tier

_LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mha", {"kv_layout": OneOf("NHD", "HND"), "unequal_v": True}),
    ("mla", {"kv_layout": OneOf("MLA", "MLA_SPLIT"), "unequal_v": True, "mla_query": ANY}),
)


def backends(device: Device) -> Iterator[BackendSpec]:
    """Rows for any device: writers of the public layouts, unfused all-reduce, linear attention by the engine."""
    platform = device.platform
    for kind, layout in _LAYOUTS:
        yield BackendSpec(
            backend="torch_native",
            role="kv_write",
            platform=platform,
            tier=Tier.REFERENCE,
            accepts={
                **layout,
                "kind": kind,
                "dtype": DTYPES,
                "head_dim": ANY,
                "page_size": ANY,
                "kv_cache_dtype": KV_DTYPES,
                "graph": OneOf("none") if platform == "cpu" else ANY,
            },
            bind="attn_core.backends.torch_native.kv_write:bind",
            evidence="tests/numerics/test_kv_write.py",
        )
    yield BackendSpec(
        backend="unfused",
        role="allreduce_fusion",
        platform=platform,
        tier=Tier.REFERENCE,
        accepts={"dtype": DTYPES, "deterministic": True, "graph": ANY},
        bind="attn_core.backends.allreduce:bind",
        evidence="all-reduce and normalisation run one after the other, as without any fusion",
    )
    for role in ("linear_prefill", "linear_decode"):
        yield BackendSpec(
            backend="engine",
            role=role,
            platform=platform,
            tier=Tier.PORTABLE,
            accepts={
                "kind": OneOf("gdn", "kda", "mamba2"),
                "dtype": DTYPES,
                "head_dim": ANY,
                "graph": ANY,
                "deterministic": True,
                **({"verify_width": ANY, "tree_mask": True} if role == "linear_decode" else {}),
            },
            evidence="the engine's own kernels run linear layers whatever attends in the others (sglang PR 18758)",
        )
