"""What flex_attention promises. Below torch_native on CPUs; a portable answer elsewhere. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attn_core.domain import ANY, OneOf
from attn_core.spec import BackendSpec, Device, Requirement, Tier

_HERE = "attn_core.backends.flex_attention.kernel"
_TORCH = Requirement("torch>=2.9", written_for="2.13.0", install="pip install 'torch>=2.9'")
"""2.9 brought AuxRequest, the way to ask for the log-sum-exp."""

_PLATFORMS = frozenset({"cpu", "cuda", "rocm", "xpu"})
"""torch's own list of device types, ``torch.nn.attention.flex_attention._validate_device`` in 2.13."""
_NO_BFLOAT16 = frozenset({"sm_75"})
"""Triton finds no dot product for these; what compiles there spills so much that a reference serves as well."""

_ALWAYS: Mapping[str, Any] = {
    "dtype": OneOf("bfloat16", "float16", "float32"),
    "head_dim": OneOf(16, 32, 64, 128, 256),
    "v_head_dim": OneOf(16, 32, 64, 128, 256),
    "unequal_v": True,
    "custom_scale": True,
    "logit_softcap": True,
    "sinks": True,
    "lse": True,
    "native_out": True,
    "strided_out": True,
}
_POSITIONS: Mapping[str, Any] = {"sliding_window": True, "attention_chunk": True, "alibi": True}
_PAGED: Mapping[str, Any] = {"kv_layout": OneOf("NHD", "HND"), "page_size": ANY}

_TABLE: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("prefill", "bind_paged", {**_PAGED, **_POSITIONS}),
    ("decode", "bind_paged", {**_PAGED, **_POSITIONS, "verify_width": ANY}),
    ("prefill", "bind_paged", {**_PAGED, "attn_type": "cross"}),
    ("decode", "bind_paged", {**_PAGED, "attn_type": "cross"}),
    ("encode", "bind_encode", {**_POSITIONS, "attn_type": "encoder_only"}),
)


def backends(device: Device) -> Iterator[BackendSpec]:
    """The rows for one device; none where torch refuses the device or its Triton cannot do bfloat16 products."""
    if device.platform not in _PLATFORMS or device.arch in _NO_BFLOAT16:
        return
    on_cpu = device.platform == "cpu"
    for role, bind, claims in _TABLE:
        yield BackendSpec(
            backend="flex_attention",
            role=role,
            platform=device.platform,
            tier=Tier.REFERENCE if on_cpu else Tier.PORTABLE,
            rank=10 if on_cpu else 50,
            accepts={**_ALWAYS, **claims, **({"graph": OneOf("none")} if on_cpu else {})},
            requires=(_TORCH,),
            bind=f"{_HERE}:{bind}",
            evidence="tests/numerics, against a float64 reference on CPU only; torch.nn.attention.flex_attention 2.13",
        )
