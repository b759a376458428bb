"""attn-core in vLLM: our decisions for a vendor's platform, and our bound kernels as an attention backend.

* ``selection.select`` answers a vendor's ``Platform`` in ``get_attn_backend_cls``: a backend, or all reasons why none.
* ``backend`` runs whatever attn-core decides on vLLM's own paged cache. It is vLLM's ``CUSTOM``:
  ``LLM(..., attention_config={"backend": "CUSTOM"})``.
* On CPUs vLLM takes no foreign backend by name, so ``cpu_platform`` replaces its CPU platform. It does so only where
  ``ATTN_CORE_VLLM=1`` asks for it, and is then the default.

vLLM finds this package by two entry points of attn-core. Neither imports anything of vLLM before it is wanted, and
without the variable nothing changes but that ``CUSTOM`` has a meaning. See docs/vllm.md.
"""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("attn_core")

ENV = "ATTN_CORE_VLLM"
"""Set to 1: our CPU platform takes the place of vLLM's, and its attention is ours."""

NAME = "CUSTOM"
"""What vLLM calls our backend: the one name for outsiders that vLLM's processes can send to each other."""

BACKEND = f"{__name__}.backend.AttnCoreBackend"

TESTED = "0.32"
"""The versions of vLLM this is tested with: others are used with a warning."""


def platform() -> str | None:
    """Entry point in ``vllm.platform_plugins``: our CPU platform when asked for and vLLM is built for CPUs, else none.

    vLLM asks twice, in each of its processes.
    """
    if os.environ.get(ENV) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin

    return f"{__name__}.cpu_platform.AttnCoreCpuPlatform" if cpu_platform_plugin() else None


def register() -> None:
    """Entry point in ``vllm.general_plugins``: give ``CUSTOM`` its meaning. vLLM may call it more than once.

    A backend that somebody else registered under that name stays.
    """
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not vllm.__version__.startswith(f"{TESTED}."):
        _log.warning("attn-core's vLLM integration is tested with %s, this is %s", TESTED, vllm.__version__)
    if not AttentionBackendEnum[NAME].is_overridden():
        register_backend(AttentionBackendEnum[NAME], BACKEND)
