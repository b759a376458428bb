"""For authors of probes: what several vendors' probes ask a machine. Imports no torch and no vendor's runtime."""

from __future__ import annotations

import importlib.util
import os
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path

TOOL_SECONDS = 10.0
"""How long a vendor's command-line tool may take; the probe as a whole has a limit of its own."""


def torch_build(runtime: str) -> str | None:
    """The ``cuda``, ``hip`` or ``xpu`` version that the installed torch was built for, from its version file alone."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    found = re.search(
        rf"^{runtime}\b[^=]*=\s*['\"]([^'\"]+)", text_of(Path(spec.origin).with_name("version.py")), re.MULTILINE
    )
    return found[1] if found else None


def runtime_packages(*names: str) -> str | None:
    """``"torch_musa 2.7.1, torchada 0.1.51"``: those of a runtime's distributions that are installed; None without."""
    found = []
    for name in names:
        with suppress(Exception):  # not installed, or its metadata is broken
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found) or None


def text_of(file: Path) -> str:
    """A file's text, empty where there is none or this process may not read it."""
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""


def tool(*command: str) -> str:
    """What a vendor's command-line tool prints; empty where it is not installed, fails or hangs."""
    import shutil
    import subprocess

    path = shutil.which(command[0])
    if path is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [path, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TOOL_SECONDS, env={**os.environ, "LC_ALL": "C"}, check=True,
        )  # fmt: skip
        return done.stdout
    return ""


def closed(node: Path) -> bool:
    """Whether a device node is there, but not for this process."""
    return node.exists() and not os.access(node, os.R_OK | os.W_OK)
