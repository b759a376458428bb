"""Which of our platforms drives the tensors of an engine that speaks torch's device types."""

from __future__ import annotations

from attn_core.errors import BadInputError
from attn_core.platform import Platform, get_platform, installed_plugins


def platform_of(device_type: str) -> Platform:
    """The platform whose tensors lie on ``device_type`` (``cpu``, ``cuda``, ``npu``, ...).

    This process's own platform where its type fits (CUDA and ROCm share one), else the first present that has it.
    Raises :class:`BadInputError` naming what was found.
    """
    own = get_platform()
    if own.spec.torch_device == device_type:
        return own
    plugins = installed_plugins()
    specs, found = plugins.platforms(), dict.fromkeys(d.platform for d in plugins.probe())
    name = next((n for n in found if n in specs and specs[n].torch_device == device_type), None)
    if name is None:
        raise BadInputError(f"the engine runs on {device_type!r}, which no plugin reports; found: {', '.join(found)}")
    return get_platform(name)
