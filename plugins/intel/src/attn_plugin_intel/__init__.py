"""Intel GPUs and kernels for x86 CPUs for attn-core: which GPUs are here, and what the kernels promise.

The ``xpu`` platform is this plugin's. The ``cpu`` platform is core's own; this adds two backends to it: ``intel_amx``
(SGLang's kernels) and ``vllm_cpu`` (vLLM's, on any CPU with AVX2). The adapters lie in ``kernels``. Importing this
imports no torch, no kernel package and touches no device.
"""

from __future__ import annotations

from collections.abc import Iterable

from attn_core.hookspecs import hookimpl
from attn_core.spec import BackendSpec, Device, PlatformSpec
from attn_plugin_intel import backends, backends_cpu, platform, probe

__version__ = "0.1.0"


@hookimpl
def attn_platforms() -> Iterable[PlatformSpec]:
    return (platform.PLATFORM,)


@hookimpl
def attn_probe_devices() -> Iterable[Device]:
    return probe.probe()


@hookimpl
def attn_backends(device: Device) -> Iterable[BackendSpec]:
    if device.platform == "cpu":
        return backends_cpu.rows(device)
    return backends.XPU if device.platform == "xpu" else ()
