"""Which NVIDIA GPUs are here: NVML when ``nvidia-ml-py`` is installed, else the driver's ``/proc`` files.

No CUDA context, no torch import. NVML counts in PCI order; CUDA does so too under ``CUDA_DEVICE_ORDER=PCI_BUS_ID``
and otherwise puts the fastest first, so on hosts with unequal GPUs set that variable. ``/proc`` knows product names
only: one that :data:`PRODUCTS` lacks cannot be placed, and is reported as an error rather than guessed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attn_core.spec import Device
from attn_plugin_cuda.platform import PLATFORM, PRODUCTS, describe


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The GPUs a CUDA program would see, numbered as it would see them. ``root`` is for tests.

    Raises :class:`LookupError` when the driver shows a GPU that only NVML could place.
    """
    visible = environ.get(PLATFORM.visible_devices_env or "")
    toolkit = {"cuda": v} if (v := torch_build("cuda")) else {}
    nvml = _nvml()
    if nvml is None:
        return tuple(_from_proc(root, visible, toolkit))
    try:
        return tuple(_from_nvml(nvml, visible, toolkit))
    finally:
        nvml.nvmlShutdown()


def torch_build(runtime: str) -> str | None:
    """Version of ``cuda`` that the installed torch was built for, read from its version file without importing it."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    text = ""
    with suppress(OSError):
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(rf"^{runtime}\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else None


def _nvml() -> Any:
    """The initialised NVML bindings, None without them or without a driver to talk to."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, another package of that name, no driver, driver and library out of step
        return None
    return nvml


def _from_nvml(nvml: Any, visible: str | None, toolkit: Mapping[str, str]) -> Iterator[Device]:
    versions = {"driver": _text(nvml.nvmlSystemGetDriverVersion()), **toolkit}
    visible = None if visible is None else ",".join(_whole_gpu(nvml, e.strip()) for e in visible.split(","))
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    uuids = [_text(nvml.nvmlDeviceGetUUID(h)) for h in handles]
    for index, i in enumerate(selected(visible, uuids)):
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handles[i])
        memory = None
        with suppress(Exception):  # GB10 shares the host's memory and has none of its own to report
            memory = int(nvml.nvmlDeviceGetMemoryInfo(handles[i]).total)
        yield describe(
            f"sm_{major}{minor}",
            index=index,
            name=_text(nvml.nvmlDeviceGetName(handles[i])),
            total_memory=memory,
            versions=versions,
            bus_id=_text(nvml.nvmlDeviceGetPciInfo(handles[i]).busId) or None,
        )


def _whole_gpu(nvml: Any, entry: str) -> str:
    """The UUID of the GPU that a MIG instance is part of; other entries as they are."""
    if not entry.startswith("MIG-"):
        return entry
    whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(entry))
    return _text(nvml.nvmlDeviceGetUUID(whole))


def _from_proc(root: Path, visible: str | None, toolkit: Mapping[str, str]) -> Iterator[Device]:
    driver = root / "proc/driver/nvidia"
    version = ""
    with suppress(OSError):
        line = (driver / "version").read_text(encoding="utf-8", errors="replace")
        version = (re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", line) or [""])[0]
    cards = []
    for file in sorted(driver.glob("gpus/*/information")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        cards.append((file.parent.name, facts.get("Model", ""), facts.get("GPU UUID", "")))
    if cards and visible is not None and "MIG-" in visible:
        raise LookupError(f"only NVML can place {visible}; install nvidia-ml-py, or the extra attn-plugin-cuda[nvml]")
    for index, i in enumerate(selected(visible, [uuid for _, _, uuid in cards])):
        bus_id, name, _ = cards[i]
        arch = arch_of(name)
        if arch is None:
            raise LookupError(
                f"the NVIDIA driver shows {name or 'a GPU'} at {bus_id}, but only NVML can tell its architecture; "
                "install nvidia-ml-py, or the extra attn-plugin-cuda[nvml]"
            )
        yield describe(arch, index=index, name=name, versions={"driver": version, **toolkit}, bus_id=bus_id)


def arch_of(name: str) -> str | None:
    """The arch of a product by its name, e.g. ``NVIDIA GeForce RTX 5090``; None unless the table has it."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    runs = ("".join(words[i:j]) for i in range(len(words)) for j in range(len(words), i, -1))
    return next((PRODUCTS[run] for run in runs if run in PRODUCTS), None)


def selected(visible: str | None, uuids: list[str]) -> list[int]:
    """Positions that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; an entry that names nothing ends the list.

    Source: CUDA C++ Programming Guide, environment variables.
    """
    if visible is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (e.strip() for e in visible.split(",")):
        if entry.isdigit():
            at = int(entry) if int(entry) < len(uuids) else None
        else:
            at = next((i for i, u in enumerate(uuids) if entry.startswith("GPU-") and u.startswith(entry)), None)
        if at is None or at in chosen:
            break
        chosen.append(at)
    return chosen


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
