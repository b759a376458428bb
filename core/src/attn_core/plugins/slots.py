"""PyTorch has one slot for devices it does not know itself (PrivateUse1): which packages here want it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from attn_core.plugins.installed import module_found
from attn_core.spec import PlatformSpec


def slot_conflict(platforms: Iterable[PlatformSpec]) -> str | None:
    """What is wrong when the runtimes of several platforms are installed together; None when it is one at most.

    Platforms that torch knows itself have no ``torch_module``. PyTorch imports such packages by itself (entry points
    ``torch.backends``), and the second to rename the slot raises, so even ``import torch`` may fail.
    """
    path = tuple(p for p in sys.path if isinstance(p, str))
    wanted = {s.torch_module: s.name for s in platforms if s.torch_module is not None}
    here = sorted(module for module in wanted if module_found(module, path))
    if len(here) < 2:
        return None
    return (
        f"{' and '.join(here)} are both installed, and each takes PyTorch's one slot for foreign devices "
        "(PrivateUse1): a process can import only one of them. Uninstall what this machine does not need, or set "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0 so that PyTorch does not import them by itself"
    )
