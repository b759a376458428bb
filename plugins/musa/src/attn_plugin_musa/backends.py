"""What MATE's kernels promise on Moore Threads GPUs. ``fa3`` and ``flashmla`` here are MATE's, of platform musa.

Source: MATE v0.2.2 (3f58cc3), dry-run under fake tensors and read; SGLang 0.5.23. What its own checks let through
wrongly is refused here:

* widths above 512, which it rounds *down* to 512 and accepts, and pairs it has no kernel for (so ``head_dims`` lists
  every pair it has);
* windows without causality, which one of its two routes drops (so encoders get no window);
* ``deterministic``, descales and fp8 caches, which it accepts and ignores, or rejects late;
* sinks together with LSE: its LSE includes the sink, so merging parts would count it twice.

Left to the adapter: sinks as bfloat16, never ``cu_seqlens_k_new`` (it is ignored by the forward and miscounted by the
metadata), metadata owned by one step's plan, warm-up before capture. Parallelism over context with a window is refused
by MATE itself and has no field here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_core.domain import ANY, OneOf
from attn_core.spec import BackendSpec, Constraint, Requirement, Tier
from attn_plugin_musa.platform import TOOLKIT

HALF = ["float16", "bfloat16"]
BOTH_LENGTHS = ["exact", "bounds"]
FAST_64 = OneOf(64, 128, 256, 512, 1024, 32, 16, 8, 4, 2, 1)
"""Any page size, 64 first: others take the slower load path."""
ENCODER = OneOf("piecewise", "none", "decode")
"""Encoders are in no decode step, so graphs of those are no trouble."""
MATE = Requirement(
    "mate>=0.2.2",
    written_for="0.2.2",
    symbols=("mate.mha_interface",),
    install="install MATE from Moore Threads or build it from its repository; mate on PyPI is another project",
)
NEEDS = (
    Requirement(f"musa>={TOOLKIT}", written_for=TOOLKIT, install="install the MUSA SDK 4.3.6 or later"),
    Requirement(
        "torch-musa>=2.7",
        written_for="2.7.1",
        symbols=("torch_musa.core",),
        install="install torch_musa from Moore Threads; it is not on PyPI",
    ),
    MATE,
)
TILELANG = Requirement(
    "tilelang-musa", symbols=("tilelang",), install="install tilelang_musa from Moore Threads: mate.flashmla imports it"
)


def table(backend: str, evidence: str, roles: Mapping[str, Mapping[str, Any]], **more: Any) -> tuple[BackendSpec, ...]:
    """One row per role: ``roles`` maps it to what it accepts, the rest holds for all of them."""
    own = {"bind": f"attn_plugin_musa.kernels.{backend}:bind", **more}
    return tuple(
        BackendSpec(
            platform="musa", backend=backend, role=role, accepts=accepts, evidence=evidence,
            needs=frozenset({"tme"}), tier=Tier.BEST, **own,
        )
        for role, accepts in roles.items()
    )  # fmt: skip


_ANY = {"dtype": HALF, "logit_softcap": True, "custom_scale": True, "lse": True}
_PAGED = {
    **_ANY, "head_dims": [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (384, 384), (512, 512)],
    "unequal_v": True, "sliding_window": True, "sinks": True, "page_size": FAST_64, "host_lengths": BOTH_LENGTHS,
}  # fmt: skip
_RAGGED = {
    **_ANY, "attn_type": ["encoder_only"], "head_dim": [64, 128, 192, 256, 384, 512], "graph": ENCODER,
}  # fmt: skip
_EXPANDED = {
    "kind": "mla", "dtype": HALF, "unequal_v": True, "custom_scale": True, "lse": True, "page_size": ANY,
    "head_dims": [(192, 128)], "kv_layout": ["MLA", "MLA_SPLIT"], "host_lengths": BOTH_LENGTHS,
}  # fmt: skip
_LATENT = {
    "kind": "mla", "dtype": HALF, "unequal_v": True, "custom_scale": True, "lse": True, "page_size": [64],
    "head_dims": [(576, 512)], "kv_layout": ["MLA"], "mla_query": ["split", "packed"], "host_lengths": BOTH_LENGTHS,
}  # fmt: skip

_FA = "MATE v0.2.2 mate/mha_interface.py, mate/jit/attention/fmha/fmha_utils.py, docs/flash_attention.md"
_MLA = "MATE v0.2.2 csrc/mla_pybind.mu (page 64, 512 + 64, one kv head, MP31)"

ROWS = (
    *table(
        "fa3",
        f"{_FA}; SGLang attention_registry.py (MP31 and later); sglang PR 22051",
        {"prefill": _PAGED, "decode": {**_PAGED, "verify_width": ANY}},
        requires=NEEDS,
    ),
    *table(
        "fa3",
        f"{_FA} (flash_attn_varlen_func without causality)",
        {"encode": _RAGGED},
        requires=NEEDS,
        pads={"head_dim"},
    ),
    *table(
        "fa3",
        f"{_FA} (192/128)",
        {"prefill": _EXPANDED},
        requires=NEEDS,
        form="materialised",
    ),
    *table(
        "fa3",
        f"{_MLA}; {_FA} (qv)",
        {"decode": {**_LATENT, "verify_width": ANY}},
        requires=NEEDS,
        form="absorbed",
    ),
    # The same kernels by FlashMLA's names; one more package, so ranked after.
    *table(
        "flashmla",
        f"{_FA} (192/128; flashmla has no dense prefill of its own)",
        {"prefill": _EXPANDED},
        rank=10,
        requires=(*NEEDS, TILELANG),
        form="materialised",
        bind="attn_plugin_musa.kernels.fa3:bind",
    ),
    *table(
        "flashmla",
        f"{_MLA}; MATE v0.2.2 mate/flashmla.py",
        {"decode": {**_LATENT, "mla_query": "packed", "verify_width": ANY}},
        rank=10,
        requires=(*NEEDS, TILELANG),
        form="absorbed",
    ),
)

RULES = tuple(
    Constraint(
        name=f"fa3-{role}-sinks-lse",
        when={role: "fa3", "sinks": OneOf(True)},
        then={"lse": False},
        because="MATE's LSE includes the sink, so merged parts would count it more than once",
        evidence="MATE v0.2.2 mate/mha_interface.py (learnable_sink)",
    )
    for role in ("prefill", "decode")
)
