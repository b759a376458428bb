"""Which AMD GPUs are here: the kernel driver's topology in sysfs. No HIP context, no library, no torch import.

A node is a GPU when it has SIMD units; its ``gfx_target_version`` is the arch. Nodes whose render node this process
cannot reach (containers see all of sysfs, but not all devices) are left out, as ROCm leaves them out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from attn_core.probing import closed, text_of, torch_build
from attn_core.spec import Device
from attn_plugin_rocm.platform import describe

NODES = "sys/class/kfd/kfd/topology/nodes"
_VRAM = {1, 2}
"""Heap types of device memory: public and private frame buffer."""


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The GPUs a HIP program would see, numbered as it would see them. ``root`` is for tests.

    Raises :class:`LookupError` when there are GPUs that this user may not open.
    """
    versions = {k: v for k, v in (("hip", torch_build("hip")), ("rocm", _rocm(root))) if v}
    found = list(_nodes(root))
    renders = [root / f"dev/dri/renderD{facts.get('drm_render_minor', 0)}" for _, facts in found]
    shut = [str(node.relative_to(root)) for node in (root / "dev/kfd", *renders) if found and closed(node)]
    if shut:
        raise LookupError(f"AMD GPUs are here, but this user may not open {', '.join(shut)}; join the group render")
    uuids = [f"GPU-{facts.get('unique_id', 0):016x}" for _, facts in found]
    at = selected(environ.get("ROCR_VISIBLE_DEVICES"), uuids)
    # HIP reads CUDA's variable where its own is not set, and counts within what ROCR left.
    hip = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
    at = [at[i] for i in selected(hip, [uuids[i] for i in at])]
    return tuple(_device(*found[i], index, versions) for index, i in enumerate(at))


def arch_of(target: int) -> str:
    """The compiler target of a packed ``gfx_target_version``: 90402 is gfx942, 90010 gfx90a, 120001 gfx1201."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def _rocm(root: Path) -> str:
    return text_of(root / "opt/rocm/.info/version").strip().partition("-")[0]


def _nodes(root: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    numbered = (p for p in (root / NODES).glob("*") if p.name.isdigit())
    for node in sorted(numbered, key=lambda p: int(p.name)):
        facts = _properties(node / "properties")
        minor = facts.get("drm_render_minor", 0)
        if facts.get("simd_count") and facts.get("gfx_target_version") and (root / f"dev/dri/renderD{minor}").exists():
            yield node, facts


def _device(node: Path, facts: Mapping[str, int], index: int, versions: Mapping[str, str]) -> Device:
    banks = [_properties(b) for b in sorted(node.glob("mem_banks/*/properties"))]
    memory = sum(b.get("size_in_bytes", 0) for b in banks if b.get("heap_type") in _VRAM)
    name = text_of(node / "name").strip()
    location = facts.get("location_id")
    bus_id = None
    if location is not None:  # bus, device and function, packed as PCI packs them
        bus_id = f"{facts.get('domain', 0):04x}:{location >> 8:02x}:{location >> 3 & 31:02x}.{location & 7}"
    arch = arch_of(facts["gfx_target_version"])
    found: dict[str, object] = {"index": index, "name": name, "versions": dict(versions), "bus_id": bus_id}
    return describe(arch, total_memory=memory or None, **found)


def _properties(file: Path) -> dict[str, int]:
    """``name value`` lines; empty for a node this process may not read."""
    pairs = (line.split() for line in text_of(file).splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()}


def selected(visible: str | None, uuids: list[str]) -> list[int]:
    """Positions that a visibility variable leaves, in its order; an entry that names nothing ends the list."""
    if visible is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (e.strip() for e in visible.split(",")):
        if entry.isdigit():
            at = int(entry) if int(entry) < len(uuids) else None
        else:
            at = uuids.index(entry) if entry in uuids else None
        if at is None or at in chosen:
            break
        chosen.append(at)
    return chosen
