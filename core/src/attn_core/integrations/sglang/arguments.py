"""Server arguments and the decision: the user's pins go in, page size and cache dtype come out.

Each function wraps a named step of SGLang's argument resolution. ``decide_first`` runs before SGLang's defaults, model
overrides and page rules, so that they find the fields filled; its declarations stay in SGLang's own record of sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attn_core.errors import AttnCoreError
from attn_core.integrations.devices import platform_of
from attn_core.integrations.sglang import NAME
from attn_core.integrations.sglang.question import (
    KV_DTYPES,
    model_spec,
    options,
    require_bound,
    sglang_kv_dtype,
)

BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "speculative_algorithm": (None,),
    "enable_two_batch_overlap": (False,),
    "enable_pdmux": (False,),
    "enable_dp_attention": (False,),
    "enable_hierarchical_cache": (False,),
    "enable_unified_memory": (False,),
    "enable_page_major_kv_layout": (False,),
    "enable_kv_cache_sharding": (False,),
    "prefill_only_disable_kv_cache": (False,),
    "disaggregation_mode": ("null",),
    "dllm_algorithm": (None,),
    "dcp_size": (1,),
    "attn_cp_size": (1,),
    "attn_dp_size": (None, 1),
    "pp_size": (1,),
}
"""Server argument -> the values this integration can serve. Everything else is refused before weights load."""

ALLOW_LISTS: Mapping[str, str] = {"GptOssForCausalLM": "triton"}
"""Architectures that SGLang asserts to fixed names -> the name that stands for ours while that step runs."""

Step = Callable[[Any], None]


def default_to_ours(server_args: Any, previous: Step) -> None:
    """Resolution step ``handle_cpu_backends``, which names ``intel_amx`` where the user named none, before it asks an
    out-of-tree platform for its default. Registered on our platform only."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    if all(getattr(cfg, name) is None for name in BACKENDS):
        declare_resolution(server_args, NAME, attention_backend=NAME)
    previous(server_args)


def decide_first(server_args: Any, previous: Step) -> None:
    """Resolution step ``handle_platform_defaults``: after it, decide, and declare page size and cache dtype.

    Raises :class:`AttnCoreError` for arguments the integration cannot serve, :class:`NoBackendError` with every reason.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    previous(server_args)
    cfg = resolving_view(server_args)
    if not selected(cfg):
        return
    refuse_unsupported(cfg)
    spec = model_spec(model_config_of(server_args))
    pins = options(
        spec,
        page_size=cfg.page_size,
        kv_cache_dtype=KV_DTYPES.get(cfg.kv_cache_dtype, cfg.kv_cache_dtype),
        tensor_parallel=cfg.tp_size,
        deterministic=cfg.enable_deterministic_inference,
    )
    decision = platform_of(cfg.device).resolve(spec, **pins)
    require_bound(decision)
    declare_resolution(
        server_args,
        NAME,
        page_size=decision.values["page_size"],
        kv_cache_dtype=sglang_kv_dtype(decision, spec),
        cuda_graph_config=without_graphs(cfg.cuda_graph_config),
    )


def pass_allow_lists(server_args: Any, previous: Step) -> None:
    """Resolution step ``handle_model_specific_adjustments``, which knows only SGLang's own backend names.

    For an architecture that is asserted to a list of them, a name from the list is declared for this step and ours
    again after it. The list is there because SGLang's other backends drop sinks; that ours apply them was decided in
    ``decide_first``, which refuses backends that do not claim them. Both declarations carry our name as their source.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    cfg = resolving_view(server_args)
    stand_in = None
    if selected(cfg):
        architectures = model_config_of(server_args).hf_config.architectures
        stand_in = next((ALLOW_LISTS[a] for a in architectures if a in ALLOW_LISTS), None)
    if stand_in is None:
        previous(server_args)
        return
    ours = [name for name in BACKENDS if getattr(cfg, name) == NAME]
    declare_resolution(server_args, f"{NAME}: stand-in", **dict.fromkeys(ours, stand_in))
    previous(server_args)
    declare_resolution(server_args, NAME, **dict.fromkeys(ours, NAME))


def selected(cfg: Any) -> bool:
    """Whether ours is the backend of both phases.

    Raises :class:`AttnCoreError` where it is that of one: attn-core chooses the kernels of both phases together.
    """
    base = cfg.attention_backend
    phases = [getattr(cfg, name) or base for name in BACKENDS[1:]]
    if NAME in phases and set(phases) != {NAME}:
        raise AttnCoreError(
            f"prefill={phases[0]} and decode={phases[1]}: {NAME} serves both phases and chooses the kernels of each; "
            f"set only --attention-backend {NAME}"
        )
    return NAME in phases


def refuse_unsupported(cfg: Any) -> None:
    """Raise :class:`AttnCoreError` naming the first argument that would ask for what this integration cannot do."""
    for name, fine in UNSUPPORTED.items():
        value = getattr(cfg, name)
        if value not in fine:
            raise AttnCoreError(
                f"--{name.replace('_', '-')}={value} is not supported with --attention-backend {NAME}; "
                f"allowed: {', '.join(map(str, fine))}"
            )


def without_graphs(config: Any) -> Any:
    """SGLang's graph settings with both phases off: what was decided (``graph="none"``)."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    for phase in (Phase.DECODE, Phase.PREFILL):
        config = with_phase(config, phase, backend=Backend.DISABLED)
    return config
