"""Multi-token-prediction layers, which engines name as an architecture of their own over the target's config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from attn_core.errors import BadInputError
from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec, Group

_NAME = re.compile(r"(MTP|NextN)$")


def is_draft(architecture: str) -> bool:
    """Whether the name is one of the draft layers: ``Qwen3NextForCausalLMMTP``, ``DeepseekV3ForCausalLMNextN``."""
    return bool(_NAME.search(architecture))


def trim(v: View, target: Mapping[str, Group]) -> dict[str, Group]:
    """The draft's groups: decoder layers with the target's full attention, counted by the config, at least one.

    Hybrid and windowed targets draft with full layers too. Source: ``DeepseekModelNextN`` and ``qwen3_next_mtp`` in
    SGLang and vLLM; MiMo-V2, which drafts with its window, has a reader of its own.
    """
    full = target.get("full")
    if not isinstance(full, AttentionSpec):
        raise BadInputError(f"{v.name}: the target has no full attention to draft with, only {', '.join(target)}")
    count = v.get("num_nextn_predict_layers") or v.get("mtp_num_hidden_layers") or 1
    return {"full": replace(full, layers=tuple(range(count if isinstance(count, int) else 1)))}
