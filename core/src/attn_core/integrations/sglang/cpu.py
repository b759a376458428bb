"""An out-of-tree CPU platform for SGLang: plain torch operators, and attn-core for attention.

SGLang's own CPU engine needs ``sglang-kernel-cpu``, which has no wheel. Out-of-tree platforms take the operators'
native forms instead, so a model runs on any x86 or Arm CPU with torch alone.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from attn_core.integrations.sglang import NAME


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc, unused-ignore]
    """CPU operators of SGLang's mixin, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return NAME
