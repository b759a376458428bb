"""Which Ascend NPUs are here: the driver's device nodes, and PCI numbers from sysfs. No ACL, no torch_npu import.

PCI numbers tell the generation but not the variant (910B1 to B4), nor the memory. Where the table lacks one (A5 is not
in it), or a container hides sysfs, the driver's ``npu-smi`` is asked for names. What neither can place is reported as
an error rather than guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from attn_core.probing import runtime_packages, text_of, tool
from attn_core.spec import Device
from attn_plugin_ascend.platform import KNOWN, PLATFORM, describe

VENDOR, ACCELERATOR = "0x19e5", "0x12"
"""Huawei makes network cards too; NPUs have the PCI class of processing accelerators."""
PCI = {"0xd500": "310p", "0xd802": "910b", "0xd803": "910c"}
"""PCI device -> arch (the driver package's log collector: d500 is 310P, d802 910B, d803 910_93)."""


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The NPUs an ACL program would see, numbered as it would see them. ``root`` is for tests.

    Raises :class:`LookupError` when the driver shows NPUs that sysfs does not place.
    """
    nodes = [p for p in (root / "dev").glob("davinci*") if re.fullmatch(r"davinci\d+", p.name)]
    if not nodes:
        return ()
    kinds, versions = _kinds(root, len(nodes)), _versions(root, environ)
    return tuple(
        describe(kinds[i][1], index=index, name=f"Ascend {kinds[i][1].upper()}", bus_id=kinds[i][0], versions=versions)
        for index, i in enumerate(selected(environ.get(PLATFORM.visible_devices_env or ""), len(nodes)))
    )


def _kinds(root: Path, nodes: int) -> list[tuple[str | None, str]]:
    """(PCI address, arch) of every NPU. Raises :class:`LookupError` where that cannot be told."""
    archs = _archs(root)
    unknown = [text for text in archs.values() if text not in KNOWN]
    kinds = list(archs.items())
    # One PCI function may carry two dies (A3), so nodes are counted and archs looked up.
    if not unknown and len(kinds) == nodes:
        return [*kinds]
    if not unknown and len(set(archs.values())) == 1:
        return [(None, kinds[0][1])] * nodes
    named = chip_archs(tool("npu-smi", "info", "-m"))
    if len(named) == nodes:
        return [(None, arch) for arch in named]
    if unknown or not archs:
        numbers = ", ".join(unknown) or "none visible"
        raise LookupError(
            f"the driver shows {nodes} Ascend NPUs, but neither sysfs (PCI numbers: {numbers}) nor npu-smi tells what "
            "they are; name the device, e.g. ascend:910b"
        )
    raise LookupError(f"cannot tell {nodes} Ascend NPUs of unlike kinds on {len(kinds)} PCI functions apart")


CHIPS = {"310P": "310p", "910B": "910b", "910_93": "910c", "910_95": "950", "950": "950"}
"""What a chip's name begins with, behind ``Ascend`` -> arch. A bare ``Ascend910`` may be A1 or A3: not placed.

Source: CANN's SoC names (ascend910b, ascend910_93, ascend950; Ascend910_95 was A5's earlier name), torchtitan-npu's
device types.
"""


def chip_archs(text: str) -> list[str]:
    """Archs in the order of the logic ids that ``npu-smi info -m`` prints; empty unless every chip has a known name.

    Its columns: NPU ID, chip ID, chip logic ID, chip name. Management controllers (``Mcu``) have no logic id.
    """
    found = {}
    for logic, name in re.findall(r"^\s*\d+\s+\d+\s+(\d+)\s+(?:Ascend)?\s*(\S+)\s*$", text, re.MULTILINE):
        found[int(logic)] = next((arch for start, arch in CHIPS.items() if name.upper().startswith(start)), None)
    archs = [arch for _, arch in sorted(found.items()) if arch]
    return archs if len(archs) == len(found) else []


def _versions(root: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Of the driver, CANN and torch_npu, as far as their files tell."""
    home = environ.get("ASCEND_HOME_PATH") or environ.get("ASCEND_TOOLKIT_HOME") or ""
    homes = [
        root / h.lstrip("/") for h in (home, "usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit/latest") if h
    ]
    installed = [file for h in homes for file in sorted(h.glob("*-linux/ascend_toolkit_install.info"))]
    said = {
        "driver": _stated(root / "usr/local/Ascend/driver/version.info"),
        "cann": next((v for file in installed if (v := _stated(file))), None),
        "runtime": runtime_packages("torch_npu"),
    }
    return {name: version for name, version in said.items() if version}


def _stated(file: Path) -> str | None:
    found = re.search(r"^version\s*=\s*(\S+)", text_of(file), re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def _archs(root: Path) -> dict[str, str]:
    """PCI address -> arch, or the number itself where the table lacks it."""
    out = {}
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        with suppress(OSError):
            vendor, number, kind = ((device / f).read_text().strip() for f in ("vendor", "device", "class"))
            if vendor == VENDOR and kind.startswith(ACCELERATOR):
                out[device.name] = PCI.get(number, number)
    return out


def selected(visible: str | None, count: int) -> list[int]:
    """Positions that ``ASCEND_RT_VISIBLE_DEVICES`` leaves. Its numbers must ascend, or ACL sees nothing."""
    if visible is None:
        return list(range(count))
    entries = [e.strip() for e in visible.split(",")]
    chosen = [int(e) for e in entries if e.isdigit() and int(e) < count]
    return chosen if len(chosen) == len(entries) and chosen == sorted(set(chosen)) else []
