"""Which Intel GPUs are here: PCI numbers of the cards that the ``xe`` or ``i915`` driver holds, from sysfs.

No Level Zero, no torch import. Only GPUs with matrix units (XMX) that kernels exist for are reported. Others, such as
the graphics of most Intel CPUs, are not: that is no error, they are just no device for attention. Memory is not told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from attn_core.probing import closed, torch_build
from attn_core.spec import Device
from attn_plugin_intel.platform import PLATFORM, describe

VENDOR = "0x8086"
PCI = {
    "pvc": "0b69 0b6e 0bd4 0bd5 0bd6 0bd7 0bd8 0bd9 0bda 0bdb",
    "bmg": "e202 e209 e20b e20c e20d e210 e211 e212 e216 e220 e221 e222 e223",
    "lnl": "6420 64a0 64b0",
    "ptl": "b080 b081 b082 b083 b084 b085 b086 b087 b08f b090 b0a0 b0b0",
}
"""Arch -> PCI devices (Linux include/drm/intel/pciids.h)."""
_ARCHS = {f"0x{number}": arch for arch, numbers in PCI.items() for number in numbers.split()}


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The GPUs a Level Zero program would see, numbered as it would see them. ``root`` is for tests.

    Raises :class:`LookupError` when there are GPUs that this user may not open.
    """
    cards = list(_cards(root))
    versions = {"xpu": v} if (v := torch_build("xpu")) else {}
    at = selected(environ.get(PLATFORM.visible_devices_env or ""), len(cards))
    return tuple(
        describe(cards[i][1], index=index, name=f"Intel {cards[i][1].upper()}", bus_id=cards[i][0], versions=versions)
        for index, i in enumerate(at)
    )


def _cards(root: Path) -> Iterator[tuple[str, str]]:
    """(PCI address, arch) of every known GPU that this process can open, in PCI order."""
    found = []
    for card in (root / "sys/class/drm").glob("renderD*"):
        with suppress(OSError):
            vendor, number = ((card / "device" / f).read_text().strip() for f in ("vendor", "device"))
            node = root / "dev/dri" / card.name
            if vendor == VENDOR and number in _ARCHS and node.exists():
                if closed(node):
                    raise LookupError(f"an Intel GPU is here, but this user may not open {node}; join the group render")
                found.append(((card / "device").resolve().name, _ARCHS[number]))
    yield from sorted(found)


def selected(visible: str | None, count: int) -> list[int]:
    """Positions that ``ZE_AFFINITY_MASK`` leaves, in device order; ``0.1`` names a tile of device 0."""
    if not visible:
        return list(range(count))
    named = {int(m[1]) for e in visible.split(",") if (m := re.fullmatch(r"\s*(\d+)(\.\d+)*\s*", e))}
    return [i for i in range(count) if i in named]
