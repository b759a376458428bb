"""What attn-core adds to SGLang: a backend name and two resolution steps; on our CPU platform two more things."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

from attn_core.integrations.sglang import NAME, TESTED, platform

_log = logging.getLogger("attn_core")

FINAL_SOFTCAP = "sglang.kernels.ops.activation.softcap.softcap_inplace_logits"
"""Caps the logits of Gemma models in place with a Triton kernel, which has no CPU to run on."""


def register() -> None:
    """Called by SGLang, once per process, before it parses arguments."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from attn_core.integrations.sglang import arguments

    found = version("sglang")
    if found != TESTED:
        _log.warning("attn-core's SGLang integration is tested with %s, this is %s", TESTED, found)
    choices.add_attention_backend_choices([NAME])
    choices.add_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)
    register_resolution_hook("handle_platform_defaults")(arguments.decide_first)
    register_resolution_hook("handle_model_specific_adjustments")(arguments.pass_allow_lists)
    if platform() is not None:
        register_resolution_hook("handle_cpu_backends")(arguments.default_to_ours)
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(FINAL_SOFTCAP, softcap_in_place, HookType.REPLACE)


def create(runner: Any) -> Any:
    """SGLang's factory of the backend; called when weights are loaded and the cache is allocated."""
    from attn_core.integrations.sglang.backend import AttnCoreBackend

    return AttnCoreBackend(runner)


def softcap_in_place(full_logits: Any, final_logit_softcapping: float) -> Any:
    """``cap * tanh(logits / cap)`` into ``full_logits``, which is returned."""
    return full_logits.div_(final_logit_softcapping).tanh_().mul_(final_logit_softcapping)
