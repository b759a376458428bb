"""Imports a vendor's functions when a backend is bound, and says what is missing when that fails."""

from __future__ import annotations

import importlib
from typing import Any

from attn_core.errors import MissingKernelError
from attn_core.spec import Requirement


def load(requirement: Requirement, module: str, *names: str) -> Any:
    """One function, or a tuple of several, of ``module``. Raises :class:`MissingKernelError`."""
    try:
        found = importlib.import_module(module)
        functions = tuple(getattr(found, name) for name in names)
    except Exception as e:  # vendors raise RuntimeError and worse where a device or driver is missing
        raise MissingKernelError(
            f"{requirement.spec} is needed for {module} ({', '.join(names)}), but importing it failed: "
            f"{type(e).__name__}: {e}; {requirement.install}"
        ) from e
    return functions[0] if len(functions) == 1 else functions
