"""The question SGLang asks: its model config as a ModelSpec, its arguments as options; and the answer in its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_core.errors import AttnCoreError
from attn_core.integrations.sglang import NAME
from attn_core.spec import Decision, ModelSpec

KV_DTYPES: Mapping[str, str | None] = {"auto": None, "bf16": "bfloat16"}
"""SGLang's spellings that differ from ours."""

PLAIN = {"attn_type": "decoder", "sparse": "none", "kv_from": None}
"""What every group must be: a decoder's dense attention over keys of its own."""

LAYOUTS = {"mha": "NHD", "mla": "MLA"}
"""What SGLang's pools look like to a kernel: (pages, page, heads, width), and one tensor of latent and rope."""


def model_spec(model_config: Any) -> ModelSpec:
    """The model in the dtype it runs in. ``model_config`` is SGLang's, with ``hf_config`` and ``dtype``.

    Raises :class:`AttnCoreError` for groups that this integration does not run.
    """
    spec = ModelSpec.from_hf_config({**model_config.hf_config.to_dict(), "dtype": str(model_config.dtype)})
    for name, group in spec.groups.items():
        for field, plain in PLAIN.items():
            if getattr(group, field, None) != plain:
                raise AttnCoreError(
                    f"{spec.architecture}: group {name!r} has {field}={getattr(group, field, None)!r}; the SGLang "
                    f"integration runs {field}={plain!r} only, use one of SGLang's own backends"
                )
    return spec


def options(
    spec: ModelSpec,
    *,
    page_size: int | None,
    kv_cache_dtype: str | None,
    tensor_parallel: int,
    deterministic: bool,
) -> dict[str, Any]:
    """EngineOptions as keywords. ``uniform="groups"``: SGLang has one backend for each phase, whatever the layer, and
    one page size and layout for all pools. Raises :class:`AttnCoreError` for a model that would need two layouts."""
    kinds = sorted({group.kind for group in spec.groups.values()})
    if len(kinds) > 1:
        raise AttnCoreError(f"{spec.architecture}: SGLang's pools hold either {' or '.join(kinds)}, not both")
    return {
        "page_size": page_size,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_layout": LAYOUTS[kinds[0]],
        "graph": "none",
        "uniform": "groups",
        "tensor_parallel": tensor_parallel,
        "deterministic": deterministic,
    }


def require_bound(decision: Decision) -> None:
    """Raise :class:`AttnCoreError` when a decided kernel is only declared, before SGLang loads any weights."""
    for name, group in decision.groups.items():
        for role, choice in group.choices.items():
            if choice.bind is None:
                raise AttnCoreError(
                    f"{role} of group {name!r} on {decision.device} was decided for {choice.backend}, which attn-core "
                    f"does not bind itself yet; SGLang's own is --attention-backend {choice.backend}"
                )


def sglang_kv_dtype(decision: Decision, spec: ModelSpec) -> str:
    """The decided cache dtype as SGLang spells it: ``auto`` is the model's own."""
    decided = decision.values["kv_cache_dtype"]
    own = {group.dtype for group in spec.groups.values()}
    if decided == "auto" or {decided} == own:
        return "auto"
    if decided not in ("bfloat16", "fp8_e4m3", "fp8_e5m2", "nvfp4"):
        raise AttnCoreError(
            f"a cache of {decided} was decided, which SGLang cannot allocate for {own} models with "
            f"--attention-backend {NAME}; set --kv-cache-dtype"
        )
    return str(decided)
