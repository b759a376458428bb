"""vLLM's CPU platform with our attention. vLLM's own takes no foreign backend by name and says so in a log line only.

vLLM imports this while it imports its config, so everything of vLLM but the platform comes in when it is called.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from vllm.platforms.cpu import CpuPlatform

from attn_core.errors import AttnCoreError, NoBackendError
from attn_core.integrations.vllm import NAME
from attn_core.integrations.vllm.question import question_of
from attn_core.integrations.vllm.refusal import refused, unknown
from attn_core.integrations.vllm.selection import beyond


class AttnCoreCpuPlatform(CpuPlatform):  # type: ignore[misc, unused-ignore]
    """Ours by default and as ``CUSTOM``; any other backend that the user names is vLLM's business, as ever."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if not _ours(selected_backend):
            return str(super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads))
        from vllm.config import get_current_vllm_config

        from attn_core.integrations.vllm.backend import AttnCoreBackend, backend_for
        from attn_core.integrations.vllm.mla import AttnCoreMlaBackend

        reasons = beyond(attn_selector_config._asdict())
        if reasons:
            raise unknown(reasons, cls.device_name, attn_selector_config)
        try:
            base = AttnCoreMlaBackend if attn_selector_config.use_mla else AttnCoreBackend
            made = backend_for(question_of(get_current_vllm_config()), base)
        except NoBackendError as e:
            raise refused(e, cls.device_name, attn_selector_config) from e
        return f"{made.__module__}.{made.__qualname__}"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """As vLLM's, then what it does for its own kernels' sake is undone where every layer is ours."""
        from vllm.v1.attention import selector

        model, cache, scheduler = vllm_config.model_config, vllm_config.cache_config, vllm_config.scheduler_config
        asked = (scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens)
        super().check_and_update_config(vllm_config)
        selector._cached_get_attn_backend.cache_clear()  # it knows layers, not models: the next engine may differ
        attention = vllm_config.attention_config
        named = (attention.backend, *(attention.backend_per_kind or {}).values())
        if model is None or not all(map(_ours, named)):
            return
        if model.use_mla:
            scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = asked
        if not cache.user_specified_block_size:
            # A refusal is said with its reasons when layers ask for their backend.
            with suppress(AttnCoreError):
                decided = question_of(vllm_config, free_page_size=True).decision.values
                cache.block_size = decided.get("page_size", cache.block_size)


def _ours(selected: Any) -> bool:
    return selected is None or selected.name == NAME
