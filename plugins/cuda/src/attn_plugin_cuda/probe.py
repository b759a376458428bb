"""Which NVIDIA GPUs are here: NVML when ``nvidia-ml-py`` is installed, else the driver's ``/proc`` files.

No CUDA context, no torch import. NVML counts in PCI order; CUDA does so too under ``CUDA_DEVICE_ORDER=PCI_BUS_ID``
and otherwise puts the fastest first, so on hosts with unequal GPUs set that variable. ``/proc`` knows product names
only: one that :data:`PRODUCTS` lacks cannot be placed, and is reported as an error rather than guessed. So is a driver
that is there and does not work: without an error it would look like a machine without GPUs.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attn_core.probing import text_of, torch_build
from attn_core.spec import Device
from attn_plugin_cuda.platform import PLATFORM, PRODUCTS, describe

NO_DRIVER = (9, 12)
"""NVML errors that mean there is none: driver not loaded, library not found (nvml.h, nvmlReturn_t)."""


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The GPUs a CUDA program would see, numbered as it would see them. ``root`` is for tests.

    Raises :class:`LookupError` when the driver shows a GPU that only NVML could place, or is there and broken.
    """
    visible = environ.get(PLATFORM.visible_devices_env or "")
    toolkit = {"cuda": v} if (v := torch_build("cuda")) else {}
    nvml = _nvml()
    if nvml is None:
        found = tuple(_from_proc(root, visible, toolkit))
        if not found and visible is None and any((root / "dev").glob("nvidia[0-9]*")):
            raise LookupError(
                "there are NVIDIA device nodes, but neither NVML nor /proc/driver/nvidia answers; check the driver "
                "(nvidia-smi), and in a container that its driver files are mounted"
            )
        return found
    try:
        return tuple(_from_nvml(nvml, visible, toolkit))
    finally:
        nvml.nvmlShutdown()


def _nvml() -> Any:
    """The initialised NVML bindings, None without them or without a driver to talk to.

    Raises :class:`LookupError` for a driver that answers with an error: CUDA will not work either.
    """
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as e:  # not installed, another package of that name, no driver
        code = getattr(e, "value", None)
        if code is None or code in NO_DRIVER:
            return None
        raise LookupError(
            f"the NVIDIA driver does not work: NVML says {e}; see nvidia-smi, and reboot after an update of the driver"
        ) from e
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
    version = (re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", text_of(driver / "version")) or [""])[0]
    cards = []
    for file in sorted(driver.glob("gpus/*/information")):
        lines = text_of(file).splitlines()
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
