"""Which Moore Threads GPUs are here: MTML when ``mthreads-ml-py`` is installed, else PCI numbers from sysfs, else names
that the driver's ``mthreads-gmi`` prints.

No MUSA context, no torch_musa import. MTML is asked for names only: its "compute capability" call imports torch_musa.
The S5000 has no entry in the public PCI database; what nobody can place is reported as an error rather than guessed.
A toolkit whose version cannot be read counts as present and unknown.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from attn_core.probing import runtime_packages, text_of, tool
from attn_core.spec import Device
from attn_plugin_musa.platform import PLATFORM, PRODUCTS, describe

VENDOR = "0x1ed5"
PCI = {
    "0x0200": "s80", "0x0201": "s80", "0x0222": "s3000", "0x0225": "s3000",
    "0x0323": "s4000", "0x0327": "s4000", "0x0328": "s4000",
}  # fmt: skip
"""PCI device -> product (pciutils' pci.ids, 2026-08-22)."""


class Card(NamedTuple):
    product: str | None
    """As in ``PRODUCTS``; None when unknown."""
    name: str
    bus_id: str | None
    memory: int | None = None


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The GPUs a MUSA program would see, numbered as it would see them. ``root`` is for tests.

    Raises :class:`LookupError` when the driver shows GPUs that none of the sources can place.
    """
    if not any((root / "dev").glob("mtgpu*")):
        return ()
    cards = _from_mtml() or list(_from_sysfs(root))
    if not all(card.product for card in cards) or not cards:
        cards = _named(cards, product_names(tool("mthreads-gmi", "-q")))
    if not cards:
        raise LookupError(
            "there are Moore Threads device nodes, but neither MTML nor sysfs nor mthreads-gmi shows a GPU; "
            "check the driver"
        )
    versions = {"musa": _toolkit(root, environ)}
    if runtime := runtime_packages("torch_musa", "torchada"):
        versions["runtime"] = runtime
    found = []
    for index, i in enumerate(selected(environ.get(PLATFORM.visible_devices_env or ""), len(cards))):
        product, name, bus_id, memory = cards[i]
        if product is None:
            raise LookupError(
                f"the driver shows a Moore Threads GPU at {bus_id} ({name}) whose architecture is not known here; "
                "install the driver's mthreads-gmi, or mthreads-ml-py, the extra attn-plugin-musa[mtml]"
            )
        arch = PRODUCTS[product]
        found.append(describe(arch, index=index, name=name, bus_id=bus_id, total_memory=memory, versions=versions))
    return tuple(found)


def product_of(name: str) -> str | None:
    """The product in a name such as ``MTT S5000``; None unless the table has it."""
    return next((word for word in re.findall(r"[a-z0-9]+", name.lower()) if word in PRODUCTS), None)


def product_names(text: str) -> list[str]:
    """GPU names in the order in which ``mthreads-gmi -q`` lists them (torch_musa docker/common reads the same line)."""
    return re.findall(r"^\s*Product Name\s*:\s*(.+?)\s*$", text, re.MULTILINE)


def _named(cards: list[Card], names: list[str]) -> list[Card]:
    """The cards with those names; as they are where the numbers differ, for then nobody knows which is which."""
    if cards and len(cards) != len(names):
        return cards
    buses = [card.bus_id for card in cards] or [None] * len(names)
    return [Card(product_of(name), name, bus_id) for name, bus_id in zip(names, buses)]


def _toolkit(root: Path, environ: Mapping[str, str]) -> str:
    """The MUSA toolkit's version as its own file states it; empty when it cannot be read."""
    home = root / (environ.get("MUSA_HOME") or "usr/local/musa").lstrip("/")
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text_of(home / "version.json"))["musa_toolkits"]["version"])
    return ""


def _from_mtml() -> list[Card]:
    try:
        mtml: Any = importlib.import_module("pymtml")
        mtml.nvmlInit()  # it speaks NVML's names
    except Exception:  # not installed, another package of that name, no library, no driver
        return []
    try:
        handles = [mtml.nvmlDeviceGetHandleByIndex(i) for i in range(mtml.nvmlDeviceGetCount())]
        return [_card(mtml, handle) for handle in handles]
    finally:
        mtml.nvmlShutdown()


def _card(mtml: Any, handle: Any) -> Card:
    name, memory, bus_id = str(mtml.nvmlDeviceGetName(handle)), None, None
    with suppress(Exception):  # some parts share the host's memory
        memory = int(mtml.nvmlDeviceGetMemoryInfo(handle).total)
    with suppress(Exception):
        bus_id = str(mtml.nvmlDeviceGetPciInfo(handle).busId) or None
    return Card(product_of(name), name, bus_id, memory)


def _from_sysfs(root: Path) -> Iterator[Card]:
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        with suppress(OSError):
            vendor, number, kind = ((device / f).read_text().strip() for f in ("vendor", "device", "class"))
            if vendor == VENDOR and kind.startswith("0x03"):  # display controllers; the audio function is 0x04
                product = PCI.get(number)
                yield Card(product, f"MTT {(product or number).upper()}", device.name)


def selected(visible: str | None, count: int) -> list[int]:
    """Positions that ``MUSA_VISIBLE_DEVICES`` leaves, in its order; an entry that names nothing ends the list."""
    if visible is None:
        return list(range(count))
    chosen: list[int] = []
    for entry in (e.strip() for e in visible.split(",")):
        if not entry.isdigit() or int(entry) >= count or int(entry) in chosen:
            break
        chosen.append(int(entry))
    return chosen
