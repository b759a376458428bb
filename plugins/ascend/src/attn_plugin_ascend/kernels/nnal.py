"""Loads ATB's kernels, whose names exist in torch_npu also where NNAL, the library behind them, does not.

Source: torch_npu 2.10.0.post4 op_plugin/atb/_atb_ops.py (the first call raises OSError); vllm-ascend 182b75e registers
them the same way.
"""

from __future__ import annotations

from typing import Any

from attn_core.adapters import load
from attn_core.errors import MissingKernelError
from attn_plugin_ascend.backends import ATB


def atb(name: str) -> Any:
    """One function of ATB. Raises :class:`MissingKernelError`."""
    register = load(ATB, "torch_npu.op_plugin.atb._atb_ops", "_register_atb_extensions")
    try:
        register()
    except Exception as e:
        raise MissingKernelError(
            f"torch_npu.{name} needs NNAL's libatb.so, and loading it failed: {type(e).__name__}: {e}; {ATB.install}"
        ) from e
    return load(ATB, "torch_npu", name)
