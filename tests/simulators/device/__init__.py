"""A device whose tensors are the host's memory, under a vendor's name: ``install("musa")``, once per process.

Built with the C++ compiler on first use (half a minute), kept under ``build/`` by a hash of source and torch version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("device.cpp")
BUILD = Path(__file__).parents[3] / "build" / "device"


class Device(ModuleType):
    """What ``torch.musa`` is then: enough for torch's own device handling, and counters."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        super().__init__(f"torch.{name}")
        self._library = library
        for symbol in ("device_allocations", "device_fallbacks"):
            getattr(library, symbol).restype = ctypes.c_int64

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def device_count(self) -> int:
        return self._library.device_count()  # type: ignore[no-any-return]

    def current_device(self) -> int:
        return self._library.device_current()  # type: ignore[no-any-return]

    def set_device(self, device: torch.device | int) -> None:
        self._library.device_set(device if isinstance(device, int) else device.index)

    @contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        """Makes ``device`` the current one inside."""
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def synchronize(self, device: object = None) -> None: ...

    @property
    def allocations(self) -> int:
        """Blocks of device memory handed out so far."""
        return self._library.device_allocations()  # type: ignore[no-any-return]

    @property
    def fallbacks(self) -> int:
        """Operators that had no device kernel and ran on the host so far."""
        return self._library.device_fallbacks()  # type: ignore[no-any-return]


def install(name: str) -> Device:
    """Make ``name`` a device of torch in this process, and return the module ``torch.<name>``.

    A process has one such device: a second name raises RuntimeError, as with two vendors' packages.
    """
    present = getattr(torch, name, None)
    if isinstance(present, Device):
        return present
    torch.utils.rename_privateuse1_backend(name)
    library = ctypes.CDLL(str(build()))
    library.device_install()
    module = Device(name, library)
    torch._register_device_module(name, module)
    sys.modules[f"torch.{name}"] = module
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
    return module


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, else c++ or g++; None without one."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")


def build() -> Path:
    """The shared library; built unless it is there. Raises RuntimeError with the compiler's words."""
    from torch.utils.cpp_extension import include_paths, library_paths

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    target = BUILD / f"device-{key}.so"
    if target.exists():
        return target
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [
        cxx, "-shared", "-fPIC", "-O1", "-std=c++20",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{p}" for p in include_paths()), *(f"-L{p}" for p in library_paths()), str(SOURCE), "-o",
        str(partial), "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cxx} failed on {SOURCE.name}:\n{done.stderr[-4000:]}")
    partial.replace(target)  # two processes may build at once; the last one wins, both are whole
    return target
