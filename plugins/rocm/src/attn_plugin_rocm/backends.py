"""What AITER's and wave's kernels promise on AMD GPUs.

Sources: AITER e404860; vLLM 0.33.0; SGLang 0.5.23; wave-lang 3.9.1; threads by repository and number. Refused here
although the calls exist: encoders (engines run them causally), cross attention, LSE and sinks from paged decode,
windows of paged decode (its variants disagree), MLA through wave (NaN on HIP 7.15). AITER's CK and assembly kernels
are CDNA's alone (aiter issue 3294); of its Triton kernels, unified attention serves gfx1201 and gfx1250 too, for those
who name it. gfx90a, gfx1100 and gfx1151 get nothing of AITER: no engine runs it there (vLLM: CDNA3 and later, RDNA4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attn_core.domain import ANY, MultipleOf, OneOf
from attn_core.spec import BackendSpec, Constraint, Device, Requirement, Tier
from attn_core.spec.fields import GRAPHS

HALF = ["bfloat16", "float16"]
CAPTURED = OneOf(*GRAPHS)
"""A device graph may hold the call, whatever is in the batch."""
NOT_CAPTURED = OneOf("decode", "piecewise", "none")
"""For prefill: graphs of pure decode steps are no trouble, since it is not in them."""
_KERNELS = "attn_plugin_rocm.kernels"
CDNA = ["gfx942", "gfx950"]
FP8 = {"gfx942": "fp8_e4m3fnuz", "gfx950": "fp8_e4m3"}
"""The 8-bit format a chip's matrix units read. One bit pattern means different numbers in the two."""

AITER = Requirement(
    "amd-aiter",
    symbols=("aiter.ops.mha", "aiter.mla"),
    install="build AITER from its repository, ROCm/aiter; aiter on PyPI is another project",
)
TRITON = Requirement(
    "triton>=3.6",
    written_for="3.7.0",
    symbols=("triton.language",),
    install="pip install 'attn-core[triton]'; some of AITER's kernels are Triton's",
)
WAVE = (
    Requirement("wave-lang>=3", written_for="3.9.1", symbols=("wave_lang",), install="pip install wave-lang"),
    Requirement(
        "sglang>=0.5",
        written_for="0.5.23",
        symbols=("sglang.srt.layers.attention.wave_ops",),
        install="install sglang for ROCm: the wave kernels are in it",
    ),
)


def table(
    backend: str,
    evidence: str,
    roles: Mapping[str, Mapping[str, Any]],
    *,
    bind: Any = None,
    needs: str = "mfma",
    **more: Any,
) -> tuple[BackendSpec, ...]:
    """One row per role: ``roles`` maps it to what it accepts, the rest holds for all; ``bind`` may be per role."""
    return tuple(
        BackendSpec(
            platform="rocm", backend=backend, role=role, accepts={"device.arch": CDNA, **accepts}, evidence=evidence,
            needs=frozenset({needs}), bind=bind[role] if isinstance(bind, dict) else bind, **more,
        )
        for role, accepts in roles.items()
    )  # fmt: skip


def _cache(device: Device) -> list[str]:
    return ["auto", FP8[device.arch]] if device.arch in FP8 else ["auto"]


_BEST: dict[str, Any] = {"tier": Tier.BEST, "requires": (AITER,)}
_ONE: dict[str, Any] = {"unified": True, "bind": f"{_KERNELS}.unified:bind", "requires": (AITER, TRITON)}
_UNIFIED = (
    "AITER ops/triton/attention/unified_attention.py (assert causal), .github/scripts/install_triton.sh (3.6 and "
    "later); vLLM rocm_aiter_unified_attn.py (pages)"
)
_UNIFIED_ELSEWHERE: tuple[tuple[list[str], str, Mapping[str, Any]], ...] = (
    (
        ["gfx1201"],  # vLLM takes gfx1200 for the same, AITER's README does not list it: refused
        "vLLM PR 46192 (RDNA4, no 8-bit cache), platforms/rocm.py; aiter issues 4329, 5229 and PR 5035 (local memory)",
        {"head_dim": MultipleOf(8, min=32, max=128), "page_size": [32], "group_size": MultipleOf(1, max=64)},
    ),
    (
        ["gfx1250"],
        "AITER op_tests/triton_tests/attention/test_unified_attention.py; vLLM platforms/rocm.py (CDNA3 and later)",
        {"page_size": [64, 16]},
    ),
)
"""Archs, source, and what is narrower there than on gfx942 and gfx950."""


def _aiter(cache: list[str]) -> Iterable[BackendSpec]:
    # CK and assembly: paged batch prefill, paged_attention_v1. What batch prefill wants of q beside an 8-bit cache is
    # not stated, and it answers in bfloat16 then: refused.
    ck = {
        "dtype": HALF, "head_dim": [64, 128, 256], "logit_softcap": True, "custom_scale": True, "page_size": [16, 32],
        "native_out": True,
    }  # fmt: skip
    yield from table(
        "aiter",
        "AITER mha_batch_prefill_func, paged_attention_v1; vLLM rocm_aiter_fa.py (gfx942 and gfx950, pages, widths)",
        {
            "prefill": {**ck, "sliding_window": True, "sinks": True, "lse": True, "graph": NOT_CAPTURED},
            "decode": {**ck, "kv_cache_dtype": cache, "graph": CAPTURED},
        },
        bind={"prefill": f"{_KERNELS}.mha:bind_prefill", "decode": f"{_KERNELS}.mha:bind_decode"},
        **_BEST,
    )
    # One Triton kernel for prefill and decode: causal only, no LSE. Serves what the others refuse.
    unified = {
        "dtype": HALF, "head_dim": MultipleOf(8, min=32, max=256), "sliding_window": True, "sinks": True,
        "logit_softcap": True, "alibi": True, "custom_scale": True, "page_size": [64, 16, 32, 128, 256],
        "kv_cache_dtype": cache, "graph": CAPTURED, "host_lengths": ["exact", "bounds"], "native_out": True,
    }  # fmt: skip
    yield from table(
        "aiter", _UNIFIED, {"prefill": unified, "decode": {**unified, "verify_width": ANY}}, tier=Tier.BEST, rank=1,
        **_ONE,
    )  # fmt: skip
    # Elsewhere behind Triton, for those who name it. Pages are the kernel's tiles there, and two stages of k and v with
    # q must stay below the 64 KiB of local memory that RDNA has: 128 wide, pages of 32, 64 query heads a kv head.
    for archs, source, narrower in _UNIFIED_ELSEWHERE:
        offered = {**unified, "kv_cache_dtype": ["auto"], "device.arch": archs, **narrower}
        yield from table(
            "aiter",
            f"{_UNIFIED}; {source}",
            {"prefill": offered, "decode": {**offered, "verify_width": ANY}},
            needs="wmma",
            tier=Tier.PORTABLE,
            rank=50,
            **_ONE,
        )
    # Claims no encoder_only, so it is refused with that reason: unified attention is causal only, and the engines run
    # the ragged kernel causally whatever the model is.
    yield from table(
        "aiter",
        "AITER ops/triton/attention/unified_attention.py (assert causal); SGLang aiter_backend.py (always causal)",
        {"encode": {"dtype": HALF, "head_dim": ANY}},
        **_BEST,
    )


def _aiter_mla(cache: list[str]) -> Iterable[BackendSpec]:
    latent = {
        "kind": "mla", "dtype": ["bfloat16"], "head_dims": [(576, 512)], "unequal_v": True, "custom_scale": True,
        "lse": True, "page_size": [1], "kv_layout": ["MLA"], "graph": CAPTURED, "native_out": True,
    }  # fmt: skip
    # An 8-bit latent cache wants q in 8 bits too, with scales that no engine derives alike: refused.
    evidence = (
        "AITER aiter/mla.py, csrc/py_itfs_cu/asm_mla.cu (token indices, 16 to 128 heads); SGLang aiter_backend.py "
        "(fewer than 16 heads are padded); sglang PR 25556 (page 64 is accepted and wrong)"
    )
    absorbed = {"form": "absorbed", "bind": f"{_KERNELS}.mla:bind", **_BEST}
    yield from table("aiter", evidence, {"decode": {**latent, "num_heads": MultipleOf(16, max=128)}}, **absorbed)
    yield from table(
        "aiter", evidence, {"decode": {**latent, "num_heads": [16]}}, pads={"num_heads"}, rank=1, **absorbed
    )
    # Prefill on the latent cache, behind the materialised one: for widths that has no kernel for. Nothing states the
    # base of its LSE: refused.
    extend = {k: v for k, v in latent.items() if k != "lse"} | {"graph": NOT_CAPTURED}
    yield from table(
        "aiter",
        "AITER aiter/mla.py:mla_prefill_fwd, csrc/py_itfs_cu/asm_mla.cu:mla_prefill_asm_fwd (16 or 128 heads), "
        "hsa/gfx942 and gfx950 mla_asm.csv, op_tests/test_mla.py (absorb prefill); SGLang aiter_backend.py",
        {"prefill": {**extend, "num_heads": [16, 128]}},
        form="absorbed",
        rank=1,
        pads={"num_heads"},
        bind=f"{_KERNELS}.mla:bind_prefill",
        **_BEST,
    )
    expanded = {
        "kind": "mla", "dtype": ["bfloat16"], "head_dims": [(192, 128)], "unequal_v": True, "custom_scale": True,
        "lse": True, "page_size": ANY, "kv_cache_dtype": cache, "kv_layout": ["MLA"], "graph": NOT_CAPTURED,
        "native_out": True,
    }  # fmt: skip
    yield from table(
        "aiter",
        "AITER flash_attn_varlen_func (fmha v3: bf16, 192/128 on gfx942 and gfx950)",
        {"prefill": expanded},
        form="materialised",
        bind=f"{_KERNELS}.mha:bind_ragged",
        **_BEST,
    )


# Behind Triton: for those who name it. It indexes by token and compiles per shape. Decode drops the scale it is given,
# and a block of its heads must not reach into the next group.
_WAVE_ANY = {"dtype": ["bfloat16", "float16"], "head_dim": [64, 128], "logit_softcap": True, "page_size": [1],
             "native_out": True}  # fmt: skip
_WAVE = table(
    "wave",
    "SGLang wave_backend.py, wave_ops/, test_wave_attention_kernels.py; wave-lang 3.9.1 kernel/wave/templates "
    "(no sinks, no windows, no encoders, no LSE; never automatic)",
    {
        "prefill": {**_WAVE_ANY, "custom_scale": True, "graph": NOT_CAPTURED},
        "decode": {**_WAVE_ANY, "group_size": [1, 2, 4, 8, 16, 32, 64, 128], "graph": CAPTURED},
    },
    bind={"prefill": f"{_KERNELS}.wave:bind_extend", "decode": f"{_KERNELS}.wave:bind_decode"},
    tier=Tier.PORTABLE,
    rank=50,
    requires=WAVE,
)


def rows(device: Device) -> Iterable[BackendSpec]:
    """Every row, whether or not the device can run it: the core explains why not."""
    cache = _cache(device)
    return (*_aiter(cache), *_aiter_mla(cache), *_WAVE)


RULES = (
    Constraint(
        name="aiter-mla-both-or-none",
        when={"kind": "mla", "prefill": "aiter"},
        then={"decode": "aiter"},
        because="AITER serves MLA as a whole: where its decode cannot take the model's heads, Triton does both",
        evidence="SGLang model_override_base.py:get_default_attn_backend (ROCm, MLA)",
    ),
)
