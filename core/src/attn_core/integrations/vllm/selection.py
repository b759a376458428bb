"""``select``: attn-core's answer to ``Platform.get_attn_backend_cls`` of a vendor's vLLM platform.

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        model = model_spec(get_current_vllm_config().model_config)
        chosen = select(attn_selector_config, selected=selected_backend, model=model)
        return AttentionBackendEnum[chosen.vllm_name].get_path()

Pure: the same arguments give the same answer, as vLLM's cache around the call expects. Needs neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attn_core.catalog import Catalog
from attn_core.errors import BadInputError, NoBackendError
from attn_core.integrations.vllm.question import kv_cache_dtype
from attn_core.integrations.vllm.refusal import SelectionError, refused, unknown
from attn_core.platform import Platform, get_platform, simulate
from attn_core.resolve import resolve
from attn_core.spec import AttentionSpec, Decision, Device, EngineOptions, ModelSpec

NAMES: Mapping[str, tuple[str, str]] = {
    "triton": ("TRITON_ATTN", "TRITON_MLA"),
    "fa2": ("FLASH_ATTN", ""),
    "fa3": ("FLASH_ATTN", "FLASH_ATTN_MLA"),
    "fa4": ("FLASH_ATTN", "FLASH_ATTN_MLA"),
    "flashinfer": ("FLASHINFER", "FLASHINFER_MLA"),
    "trtllm_mha": ("FLASHINFER", ""),
    "trtllm_mla": ("", "FLASHINFER_MLA"),
    "cutlass_mla": ("", "CUTLASS_MLA"),
    "flashmla": ("", "FLASHMLA"),
    "aiter": ("ROCM_AITER_FA", "ROCM_AITER_MLA"),
    "intel_xpu": ("FLASH_ATTN", ""),
    "intel_amx": ("", "AMX_MLA"),
    "vllm_cpu": ("CPU_ATTN", ""),
}
"""Our backend -> vLLM's names for its own adapter of the same kernels, MHA and MLA. What is not here is chosen only
where the platform names a class for it: vLLM's FLEX_ATTENTION, for one, has no sinks, while ours has."""

ATTN_TYPES: Mapping[str, str] = {
    "decoder": "decoder",
    "encoder": "encoder_only",
    "encoder_only": "encoder_only",
    "encoder_decoder": "cross",
}
"""vLLM's types -> ours."""

READ = frozenset({
    "head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "has_sink", "use_sparse", "use_mm_prefix",
    "attn_type", "has_sliding_window",
})  # fmt: skip
"""Fields of the selector's config that are part of our question. Any other that is set must be handled by the caller:
what nobody claims is refused, including fields that later versions add."""


ATTENDS = ("encode", "prefill", "decode")
"""Roles that vLLM's backend classes play."""


@dataclass(frozen=True)
class Selection:
    """One layer's answer, and the decision it is part of."""

    decision: Decision
    group: str
    vllm_name: str
    """What ``names`` calls the backend; a member of vLLM's enum unless the platform gave its own."""

    @property
    def backend(self) -> str:
        """Our name."""
        return self.decision.backend(self.decision.model.groups[self.group].roles[0], self.group)


def select(
    config: Any,
    device: str | Device | None = None,
    *,
    selected: Any = None,
    model: ModelSpec | None = None,
    num_heads: int | None = None,
    names: Mapping[str, str] | None = None,
    handles: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Selection:
    """Which backend serves the layer that vLLM's ``AttentionSelectorConfig`` describes.

    ``device``: a :class:`Device`, ``cuda:sm_90`` with the packages installed here, the name of a platform present, or
    None for this process's own. ``selected``: the user's choice, a member of vLLM's enum or its name; it is honoured
    or refused. ``model``: the whole model; the layer's group is found in it and all groups are decided together.
    Without it the layer is a model of its own, and what the config does not say comes as ``num_heads`` and ``facts``
    (fields of :class:`AttentionSpec`: ``num_kv_heads``, ``sliding_window``, ``logit_softcap``, ``alibi_slopes``, ...).
    ``names`` maps our backends to the platform's class paths or vLLM's names, before :data:`NAMES`. ``handles`` names
    fields of the config that the platform sees to itself (``use_kv_connector``, ``use_dcp``). ``options`` are further
    fields of :class:`EngineOptions`.

    Raises :class:`SelectionError`, a ``ValueError``, with all reasons by backend.
    """
    platform = _platform(device)
    where = str(platform.device)
    fields = config._asdict()
    _check_handled(fields, handles, where, config)
    spec = ModelSpec.of(_layer(fields, num_heads, facts)) if model is None else model
    group = _group_of(spec, fields)
    known = _names(platform, bool(fields["use_mla"]), names or {})
    wanted = None if selected is None else str(getattr(selected, "name", selected))
    allowed = {ours for ours, theirs in known.items() if theirs and wanted in (None, theirs)}
    if not allowed:
        on_offer = sorted({theirs for theirs in known.values() if theirs})
        raise unknown([f"no plugin offers {wanted} on {where}; offered: {', '.join(on_offer)}"], where, config)
    asked = {
        "page_size": fields["block_size"],
        "kv_cache_dtype": kv_cache_dtype(fields["kv_cache_dtype"]),
        "uniform": "all",  # vLLM has one class for a layer's prefill and decode
        **(options or {}),
    }
    try:
        decision = resolve(
            platform.device, spec, EngineOptions.of(**asked), _only(platform.catalog, allowed), platform.installed
        )
    except NoBackendError as e:
        raise refused(e, where, config, selected=wanted) from e
    role = spec.groups[group].roles[0]
    return Selection(decision, group, known[decision.backend(role, group)])


def _platform(device: str | Device | None) -> Platform:
    if device is None:
        return get_platform()
    if isinstance(device, Device) or ":" in device:
        return simulate(device, installed=True)
    return get_platform(device)


def beyond(fields: Mapping[str, Any]) -> list[str]:
    """What a selector asks for, or ``validate_configuration`` is asked, beyond what our own backend runs in vLLM."""
    found = [f"{name} is not supported in vLLM by attn-core" for name, on in fields.items() if on and name not in READ]
    if fields["use_mm_prefix"]:
        found.append("images that see each other in both directions (use_mm_prefix) are not supported in vLLM yet")
    if _attn_type(fields) == "cross" or fields["attn_type"] == "encoder":
        found.append(f"attention type {fields['attn_type']} is not supported in vLLM yet: no cross attention")
    return found


def _attn_type(fields: Mapping[str, Any]) -> str:
    """Ours; vLLM's is an enum of strings, or its value."""
    return ATTN_TYPES[str(getattr(fields["attn_type"], "value", fields["attn_type"]))]


def _check_handled(fields: Mapping[str, Any], handles: Collection[str], where: str, config: Any) -> None:
    for name in handles:
        if name not in fields:
            raise BadInputError(f"handles={name!r} is no field of {type(config).__name__}: {', '.join(fields)}")
    open_fields = [name for name, value in fields.items() if value and name not in READ and name not in handles]
    if open_fields:
        reasons = [f"{name} is not supported; a platform that sees to it says handles={name!r}" for name in open_fields]
        raise unknown(reasons, where, config)


def _layer(fields: Mapping[str, Any], num_heads: int | None, facts: Mapping[str, Any]) -> AttentionSpec:
    """One layer as far as the config and the caller describe it."""
    missing = [name for name, needed in (("num_heads", num_heads is None),) if needed]
    if fields["use_mla"] or fields["use_sparse"]:
        missing += [name for name in ("latent_dim", "rope_dim", "nope_dim") if name not in facts]
    if fields["has_sliding_window"] and "sliding_window" not in facts:
        missing.append("sliding_window")
    if missing:
        raise BadInputError(
            f"select: vLLM's config does not say {', '.join(missing)}; "
            "give model=model_spec(vllm_config.model_config), or these as keywords"
        )
    stated = {
        "num_heads": num_heads,
        "head_dim": fields["head_size"],
        "dtype": str(fields["dtype"]),
        "attn_type": _attn_type(fields),
        "sinks": fields["has_sink"],
        "bidirectional_prefix": fields["use_mm_prefix"],
        "kind": "mla" if fields["use_mla"] else "mha",
        "sparse": "dsa" if fields["use_sparse"] else "none",
    }
    if fields["use_mla"]:  # vLLM's head_size is the latent row, ours the width of the model's heads
        stated["head_dim"] = facts["nope_dim"] + facts["rope_dim"]
    return AttentionSpec(**{**stated, **facts})


def _group_of(model: ModelSpec, fields: Mapping[str, Any]) -> str:
    """The group of ``model`` that a selector's config describes: what vLLM tells layers apart by, we compare."""
    asked = (
        _attn_type(fields), bool(fields["use_mla"]), fields["head_size"], bool(fields["has_sliding_window"]),
        bool(fields["has_sink"]), bool(fields["use_sparse"]),
    )  # fmt: skip
    seen = {name: _seen(g) for name, g in model.groups.items() if isinstance(g, AttentionSpec)}
    found = [name for name, of in seen.items() if of == asked]
    if not found:
        words = ("attn_type", "use_mla", "head_size", "has_sliding_window", "has_sink", "use_sparse")
        listed = "; ".join(f"{name}: {dict(zip(words, of))}" for name, of in seen.items())
        raise BadInputError(
            f"select: no group of {model.architecture or 'the model'} is {dict(zip(words, asked))}; groups are {listed}"
        )
    return found[0]


def _seen(g: AttentionSpec) -> tuple[object, ...]:
    mla = g.kind == "mla"
    width = (g.latent_dim or 0) + (g.rope_dim or 0) if mla else g.head_dim
    return (g.attn_type, mla, width, g.sliding_window is not None, g.sinks, g.sparse != "none")


def _names(platform: Platform, use_mla: bool, own: Mapping[str, str]) -> dict[str, str]:
    """Every backend declared for the device -> the name to return; empty where there is none."""
    declared = {b.backend for d in platform.catalog.devices.values() for b in d.backends if b.role in ATTENDS}
    return {ours: own.get(ours, NAMES.get(ours, ("", ""))[use_mla]) for ours in sorted(declared)}


def _only(catalog: Catalog, backends: Collection[str]) -> Catalog:
    """The catalogue with these backends to attend; who writes pages stays."""
    kept = {
        device: replace(d, backends=tuple(b for b in d.backends if b.role not in ATTENDS or b.backend in backends))
        for device, d in catalog.devices.items()
    }
    return replace(catalog, devices=kept)


__all__ = ["NAMES", "Selection", "SelectionError", "select"]
