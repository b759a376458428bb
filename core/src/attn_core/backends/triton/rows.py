"""What the Triton kernels promise. No torch, no Triton here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attn_core.backends.triton.config import FAMILIES, Family, family, serves_latent, widest
from attn_core.domain import ANY, Domain, MultipleOf, OneOf
from attn_core.spec import BackendSpec, Device, Requirement, Tier

_HERE = "attn_core.backends.triton"
_INSTALL = {"cuda": "pip install 'attn-core[triton]'", "rocm": "pip install 'attn-core[triton]'",
            "xpu": "install PyTorch for XPU, which brings it"}  # fmt: skip
_NAMES = {"xpu": "triton-xpu"}
"""Distributions other than ``triton``: Intel's compiler is a fork."""

_FLOOR = {"cuda": "3.6", "sm_110": "3.7"}
"""Oldest Triton that the kernels compile with, where it is not 3.7; the assembler of 3.6 does not know sm_110a."""

_NO_E4M3 = frozenset({"sm_75", "sm_80", "sm_86"})
"""Triton has no conversion from fp8e4nv before sm_89; fp8e5 and int8 it has everywhere."""

_ALWAYS: Mapping[str, Any] = {
    "unequal_v": True,
    "custom_scale": True,
    "deterministic": True,
    "lse": True,
    "native_out": True,
    "strided_out": True,
}
_PAGED: Mapping[str, Any] = {"page_size": ANY, "host_lengths": OneOf("exact", "bounds")}
_HEADS: Mapping[str, Any] = {**_ALWAYS, **_PAGED, "kv_layout": OneOf("NHD", "HND")}
_LATENT: Mapping[str, Any] = {
    **_ALWAYS,
    **_PAGED,
    "kind": "mla",
    "kv_layout": OneOf("MLA", "MLA_SPLIT"),
    "mla_query": OneOf("packed", "split"),
    "head_dim": ANY,
    "v_head_dim": ANY,
    "latent_dim": OneOf(16, 32, 64, 128, 256, 512),
    "rope_dim": MultipleOf(8, max=64),
}
_SCORES: Mapping[str, Any] = {"logit_softcap": True, "sinks": True, "bias": True}
_POSITIONS: Mapping[str, Any] = {"sliding_window": True, "attention_chunk": True, "alibi": True}
_VERIFY: Mapping[str, Any] = {"verify_width": ANY, "tree_mask": True}
_SPARSE: Mapping[str, Any] = {"sparse": "dsa", "topk": ANY}
_SPANS: Mapping[str, Any] = {"bidirectional_prefix": OneOf(True), "host_lengths": "exact"}
_DECODER = {**_HEADS, **_SCORES, **_POSITIONS}
_CROSS = {**_HEADS, **_SCORES, "attn_type": "cross"}
_ABSORBED = {**_LATENT, "logit_softcap": True, "sinks": True, "sliding_window": True}
_MATERIALISED = {
    **_ALWAYS, "kind": "mla", "kv_cache_dtype": ANY, "kv_layout": ANY, "page_size": ANY, "logit_softcap": True,
}  # fmt: skip
_ENCODER = {**_ALWAYS, **_SCORES, **_POSITIONS, "attn_type": "encoder_only"}
_GRAPHS = OneOf("full", "decode", "piecewise", "none")
_EAGER = OneOf("decode", "piecewise", "none")
"""Prefill is in no graph of decode steps; its own launches depend on the batch."""

EVIDENCE = {
    "cuda": "tests/triton_kernels: float64 reference in Triton's interpreter, compiled for sm_75 to sm_121; "
    "run on an H100 (docs/hardware/cuda-sm_90.json)",
    "rocm": "tests/triton_kernels: float64 reference in Triton's interpreter, compiled for gfx90a to gfx1250; not run",
    "xpu": "tests/triton_kernels: float64 reference in Triton's interpreter; neither compiled nor run for XPU",
}

_TABLE: tuple[tuple[str, str | None, str, Mapping[str, Any], int], ...] = (
    # role, form, bind, claims, rank
    ("prefill", None, "bind_prefill", _DECODER, 0),
    ("decode", None, "bind_decode", {**_DECODER, **_VERIFY}, 0),
    ("prefill", None, "bind_prefill", {**_DECODER, **_SPANS}, 0),
    ("decode", None, "bind_decode", {**_DECODER, **_VERIFY, **_SPANS}, 0),
    ("prefill", None, "bind_prefill", _CROSS, 0),
    ("decode", None, "bind_decode", {**_CROSS, "verify_width": ANY}, 0),
    ("prefill", "absorbed", "bind_prefill", _ABSORBED, 1),
    ("decode", "absorbed", "bind_decode", {**_ABSORBED, **_VERIFY}, 0),
    ("prefill", "materialised", "bind_prefill", _MATERIALISED, 0),
    ("encode", None, "bind_encode", _ENCODER, 0),
    ("prefill", None, "bind_prefill", {**_HEADS, **_SPARSE}, 0),
    ("decode", None, "bind_decode", {**_HEADS, **_SPARSE, "verify_width": ANY}, 0),
    ("prefill", "absorbed", "bind_prefill", {**_LATENT, **_SPARSE}, 0),
    ("decode", "absorbed", "bind_decode", {**_LATENT, **_SPARSE, "verify_width": ANY}, 0),
)
_WRITER: tuple[Mapping[str, Any], ...] = (
    {"kv_layout": OneOf("NHD", "HND"), "unequal_v": True},
    {"kind": "mla", "kv_layout": OneOf("MLA", "MLA_SPLIT"), "unequal_v": True, "mla_query": ANY},
)


def backends(device: Device) -> Iterator[BackendSpec]:
    """The rows for one device; none on platforms whose Triton is a fork that nothing here was compiled with."""
    if device.platform not in FAMILIES:
        return
    found = family(device.platform, device.arch, device.shared_memory_per_block)
    floor = _FLOOR.get(device.arch) or _FLOOR.get(device.platform, "3.7")
    needs = Requirement(
        f"{_NAMES.get(device.platform, 'triton')}>={floor}", written_for="3.9.0", symbols=("triton.language",),
        install=_INSTALL[device.platform],
    )  # fmt: skip
    kv_dtypes = OneOf("auto", *(() if device.arch in _NO_E4M3 else ("fp8_e4m3",)), "fp8_e5m2", "int8")
    common: dict[str, Any] = {
        "backend": "triton", "platform": device.platform, "tier": Tier.PORTABLE, "requires": (needs,),
        "evidence": EVIDENCE[device.platform],
    }  # fmt: skip
    for dtypes, width, latent in _classes(found):
        widths = {n: MultipleOf(8, min=16, max=width) for n in ("head_dim", "v_head_dim")}
        for role, form, bind, claims, rank in _TABLE:
            if form == "absorbed" and not latent:
                continue
            graph = _GRAPHS if role == "decode" else _EAGER
            cached = {} if role == "encode" or form == "materialised" else {"kv_cache_dtype": kv_dtypes}
            yield BackendSpec(
                role=role, form=form, rank=rank, bind=f"{_HERE}.launch:{bind}",
                accepts={"dtype": dtypes, "graph": graph, **widths, **cached, **claims}, **common,
            )  # fmt: skip
    for claims in _WRITER:
        yield BackendSpec(
            role="kv_write", bind=f"{_HERE}.kv_write:bind",
            accepts={
                "dtype": OneOf(*_HALF, "float32"), "graph": _GRAPHS, "head_dim": ANY, "page_size": ANY,
                "kv_cache_dtype": kv_dtypes, **claims,
            }, **common,
        )  # fmt: skip


_HALF = ("bfloat16", "float16")


def _classes(found: Family) -> Iterator[tuple[Domain, int, bool]]:
    """(dtypes, largest width, whether absorbed MLA fits): one class where float32 is served as half precision is."""
    half = (widest(found, 2), serves_latent(found, 2))
    single = (min(half[0], widest(found, 4)), half[1] and serves_latent(found, 4))
    if half == single:
        yield OneOf(*_HALF, "float32"), *half
    else:
        yield OneOf(*_HALF), *half
        yield OneOf("float32"), *single
