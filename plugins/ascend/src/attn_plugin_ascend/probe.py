"""Which Ascend NPUs are here: the driver's device nodes, and PCI numbers from sysfs. No ACL, no torch_npu import.

PCI numbers tell the generation but not the variant (910B1 to B4), nor the memory. A number that the table lacks
(A5 is not in it) cannot be placed; that is reported as an error rather than guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

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
    archs = _archs(root)
    unknown = [text for text in archs.values() if text not in KNOWN]
    if unknown or not archs:
        raise LookupError(
            f"the driver shows {len(nodes)} Ascend NPUs, but sysfs does not tell what they are "
            f"(PCI numbers: {', '.join(unknown) or 'none visible'}); name the device, e.g. ascend:910b"
        )
    # One PCI function may carry two dies (A3), so nodes are counted and archs looked up.
    kinds = list(archs.items())
    paired = len(kinds) == len(nodes)
    if not paired and len(set(archs.values())) > 1:
        raise LookupError(f"cannot tell {len(nodes)} Ascend NPUs of unlike kinds on {len(kinds)} PCI functions apart")
    found = []
    for index, i in enumerate(selected(environ.get(PLATFORM.visible_devices_env or ""), len(nodes))):
        bus_id, arch = kinds[i] if paired else (None, kinds[0][1])
        found.append(describe(arch, index=index, name=f"Ascend {arch.upper()}", bus_id=bus_id))
    return tuple(found)


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
