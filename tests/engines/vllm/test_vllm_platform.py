"""Our CPU platform's answers to vLLM, without an engine: what is refused, and when it steps in at all."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from attn_core.integrations import vllm as integration
from attn_core.integrations.vllm.backend import AttnCoreBackend
from attn_core.integrations.vllm.cpu_platform import AttnCoreCpuPlatform
from attn_core.integrations.vllm.selection import READ, SelectionError

PLAIN: dict[str, Any] = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None}
BEYOND = sorted(set(AttentionSelectorConfig._fields) - READ)


@pytest.mark.parametrize(
    "changes",
    [*({name: True} for name in BEYOND), {"use_mm_prefix": True}, {"attn_type": "encoder_decoder"}],
    ids=str,
)
def test_what_we_do_not_run_is_refused(changes: dict[str, Any]) -> None:
    config = AttentionSelectorConfig(**{**PLAIN, **changes})
    with pytest.raises(SelectionError, match="not supported in vLLM"):
        AttnCoreCpuPlatform.get_attn_backend_cls(None, config)
    reasons = AttnCoreBackend.validate_configuration(device_capability=None, **config._asdict())
    assert any("not supported in vLLM" in text for text in reasons)


def test_the_fields_we_read_exist() -> None:
    assert set(AttentionSelectorConfig._fields) >= READ


def test_another_backend_is_vllms_business() -> None:
    config, named = AttentionSelectorConfig(**PLAIN), AttentionBackendEnum.CPU_ATTN
    assert AttnCoreCpuPlatform.get_attn_backend_cls(named, config) == CpuPlatform.get_attn_backend_cls(named, config)


@pytest.mark.parametrize("asked", ["1", "0", ""])
def test_the_platform_only_comes_when_asked_for(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(integration.ENV, asked)
    ours = "attn_core.integrations.vllm.cpu_platform.AttnCoreCpuPlatform"
    assert integration.platform() == (ours if asked == "1" else None)


def test_custom_is_ours_unless_somebody_has_it() -> None:
    code = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Enum, register_backend
from attn_core.integrations import vllm
vllm.register(); vllm.register()
assert Enum.CUSTOM.get_path() == vllm.BACKEND
assert Enum.CUSTOM.get_class().get_name() == "CUSTOM"
Enum.CUSTOM.clear_override(); register_backend(Enum.CUSTOM, "somebody.Else")
vllm.register()
assert Enum.CUSTOM.get_path() == "somebody.Else"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
