"""MLA in SGLang's DeepSeek models: always absorbed, over the latent pool.

Each layer of such a model has two attentions: one over the latent cache, and one with expanded keys for prefill. Which
runs is chosen per backend name; ours answers the first, so a kernel sees one kind of rows and the cache it decided for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.integrations.sglang import NAME
from attn_core.runtime import BoundGroup
from attn_core.spec import AttentionSpec


def always_absorbed() -> None:
    """Tell SGLang's DeepSeek models which of their attentions to run with our backend."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register(NAME, lambda attention, forward_batch: AttnForwardMethod.MLA)


def expanded(layer: Any, spec: AttentionSpec) -> bool:
    """Whether a layer is the attention with expanded keys, which is never called here."""
    return spec.kind == "mla" and (layer.tp_k_head_num, layer.qk_head_dim) == (spec.num_heads, spec.head_dim)


def require_absorbed(group: BoundGroup) -> None:
    """Raise :class:`AttnCoreError` when the group's kernels want something else than SGLang hands over: absorbed
    queries, latent and rope in one tensor."""
    if group.spec.kind == "mla" and (group.materialised or group.mla_query != "packed"):
        form = "materialised prefill" if group.materialised else f"{group.mla_query} queries"
        raise AttnCoreError(
            f"group {group.name!r} was decided for {form}, SGLang's models give packed absorbed ones; use one of "
            "SGLang's own backends"
        )


def new_rows(k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """What ``write_kv`` takes. MLA: k ``(tokens, 1, latent + rope)``, v its latent part -> latent, rope."""
    return (v[:, 0], k[:, 0, v.shape[-1] :]) if spec.kind == "mla" else (k, v)
