"""What torch_native promises: everything in the vocabulary, at REFERENCE tier, on every device. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attn_core.domain import ANY, OneOf
from attn_core.spec import BackendSpec, Device, Tier

_HERE = "attn_core.backends.torch_native"
DTYPES = OneOf("bfloat16", "float16", "float32")
KV_DTYPES = OneOf("auto", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "int8")

_ALWAYS: Mapping[str, Any] = {
    "dtype": DTYPES,
    "head_dim": ANY,
    "custom_scale": True,
    "deterministic": True,
    "lse": True,
    "native_out": True,
    "strided_out": True,
}
_PAGED: Mapping[str, Any] = {"kv_cache_dtype": KV_DTYPES, "page_size": ANY, "host_lengths": OneOf("exact", "bounds")}
_HEADS: Mapping[str, Any] = {**_PAGED, "kv_layout": OneOf("NHD", "HND"), "unequal_v": True}
_LATENT: Mapping[str, Any] = {
    **_PAGED,
    "kind": "mla",
    "kv_layout": OneOf("MLA", "MLA_SPLIT"),
    "mla_query": OneOf("packed", "split"),
    "unequal_v": True,
}
_SCORES: Mapping[str, Any] = {"logit_softcap": True, "sinks": True, "bias": True}
_POSITIONS: Mapping[str, Any] = {"sliding_window": True, "attention_chunk": True, "alibi": True}
_VERIFY: Mapping[str, Any] = {"verify_width": ANY, "tree_mask": True}
_SPARSE: Mapping[str, Any] = {"sparse": "dsa", "topk": ANY}

_DECODER = {**_HEADS, **_SCORES, **_POSITIONS, "bidirectional_prefix": True}
_CROSS = {**_HEADS, **_SCORES, "attn_type": "cross"}
_ABSORBED = {**_LATENT, "logit_softcap": True, "sinks": True, "sliding_window": True}
_MATERIALISED = {"kind": "mla", "kv_cache_dtype": KV_DTYPES, "kv_layout": ANY, "unequal_v": True, "logit_softcap": True}
_ENCODER = {**_SCORES, **_POSITIONS, "attn_type": "encoder_only", "unequal_v": True}

_TABLE: tuple[tuple[str, str | None, str, Mapping[str, Any], int], ...] = (
    # role, form, bind, claims, rank
    ("prefill", None, "prefill:bind", _DECODER, 0),
    ("decode", None, "decode:bind", {**_DECODER, **_VERIFY}, 0),
    ("prefill", None, "prefill:bind", _CROSS, 0),
    ("decode", None, "decode:bind", {**_CROSS, "verify_width": ANY}, 0),
    ("prefill", "absorbed", "prefill:bind", _ABSORBED, 0),
    ("decode", "absorbed", "decode:bind", {**_ABSORBED, **_VERIFY}, 0),
    ("prefill", "materialised", "prefill:bind", _MATERIALISED, 1),
    ("encode", None, "prefill:bind_encode", _ENCODER, 0),
    ("prefill", None, "sparse:bind", {**_HEADS, **_SPARSE}, 0),
    ("decode", None, "sparse:bind", {**_HEADS, **_SPARSE, "verify_width": ANY}, 0),
    ("prefill", "absorbed", "sparse:bind", {**_LATENT, **_SPARSE}, 0),
    ("decode", "absorbed", "sparse:bind", {**_LATENT, **_SPARSE, "verify_width": ANY}, 0),
)


def backends(device: Device) -> Iterator[BackendSpec]:
    """The rows for one device: the same everywhere, but that the CPU has no graphs."""
    graph = {"graph": OneOf("none")} if device.platform == "cpu" else {}
    for role, form, bind, claims, rank in _TABLE:
        yield BackendSpec(
            backend="torch_native",
            role=role,
            platform=device.platform,
            tier=Tier.REFERENCE,
            rank=rank,
            form=form,
            accepts={**_ALWAYS, **claims, **graph},
            bind=f"{_HERE}.{bind}",
            evidence="tests/numerics, against a float64 reference on CPU",
        )
