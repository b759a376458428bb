"""attn-core in SGLang: decisions before SGLang's own rules run, and the bound kernels as an attention backend.

SGLang finds this package by two entry points of attn-core. Installing it changes nothing: ``register`` adds the
backend name ``attn_core`` beside SGLang's own, and ``platform`` answers only when asked for by name.

* ``--attention-backend attn_core`` on any device whose kernels attn-core binds.
* ``SGLANG_PLATFORM=attn_core`` on a CPU, where SGLang has no wheel of its own; the backend is then the default.

See docs/sglang.md.
"""

from __future__ import annotations

import os

NAME = "attn_core"
"""The attention backend, the platform and both plugins."""

TESTED = "0.5.23"
"""The version of SGLang this is tested with; others are used with a warning."""


def platform() -> str | None:
    """Entry point in ``sglang.srt.platforms``: our CPU platform when ``SGLANG_PLATFORM`` names it, else nothing."""
    return f"{__name__}.cpu:CpuPlatform" if os.environ.get("SGLANG_PLATFORM") == NAME else None


def register() -> None:
    """Entry point in ``sglang.srt.plugins``: SGLang calls it in each of its processes."""
    from attn_core.integrations.sglang.registration import register

    register()
