"""What a machine offers: a device, and the facts of the vendor runtime that drives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attn_core.errors import BadInputError
from attn_core.spec import check


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator (or the host CPU) as data. Architectures are sets of ``isa`` tokens, never numbers to compare."""

    platform: str
    """Name of the :class:`PlatformSpec` that drives it: ``cpu``, ``cuda``, ``rocm``, ``musa``, ``ascend``, ``xpu``."""
    arch: str
    """Exact architecture: ``sm_121``, ``gfx942``, ``mp31``, ``910b``, ``avx512_bf16``."""
    isa: frozenset[str] = frozenset()
    """Instruction-set tokens a backend may need: ``wgmma``, ``tcgen05``, ``mfma``, ``amx_bf16``, ..."""
    name: str = ""
    index: int = 0
    total_memory: int | None = None
    """Bytes; None when unknown."""
    shared_memory_per_block: int | None = None
    """Bytes a thread block may use (opt-in limit); None when unknown or meaningless."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Toolkit, driver and runtime versions, e.g. ``{"cuda": "13.0", "driver": "580.65"}``; usable in ``requires``."""
    bus_id: str | None = field(default=None, compare=False)
    """PCI address (``0000:3b:00.0``) if the probe knows it: tells when two probes report one physical device. It says
    where a device sits, not what it is, so it is no part of comparisons, decisions and their digests."""

    def __post_init__(self) -> None:
        where = f"Device({self.platform}:{self.arch})"
        for name in ("platform", "arch"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or ":" in value:
                raise BadInputError(f"{where}: {name}={value!r} must be a non-empty name without ':'")
        object.__setattr__(self, "isa", frozenset(self.isa))
        object.__setattr__(self, "versions", dict(self.versions))
        if self.bus_id is not None and not (isinstance(self.bus_id, str) and self.bus_id):
            raise BadInputError(f"{where}: bus_id={self.bus_id!r} must be a PCI address or None")
        check.size(where, "index", self.index, least=0)
        check.size(where, "total_memory", self.total_memory, optional=True, least=0)
        check.size(where, "shared_memory_per_block", self.shared_memory_per_block, optional=True, least=0)

    def __str__(self) -> str:
        return f"{self.platform}:{self.arch}"

    def __hash__(self) -> int:
        return hash((self.platform, self.arch, self.index, self.isa))

    def to_json(self) -> dict[str, object]:
        return {
            "platform": self.platform,
            "arch": self.arch,
            "isa": sorted(self.isa),
            "name": self.name,
            "index": self.index,
            "total_memory": self.total_memory,
            "shared_memory_per_block": self.shared_memory_per_block,
            "versions": dict(sorted(self.versions.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        return cls(**{**data, "isa": frozenset(data["isa"])})


@dataclass(frozen=True, kw_only=True)
class PlatformSpec:
    """What an engine must know of a vendor's runtime. Static; reading it imports nothing heavy."""

    name: str
    torch_device: str
    """Device type string that torch uses: ``cuda`` for CUDA and ROCm, ``musa``, ``npu``, ``xpu``, ``cpu``."""
    torch_module: str | None = None
    """Package that must be imported before torch knows the device (``torch_npu``), None when torch itself does."""
    dist_backend: str = "gloo"
    visible_devices_env: str | None = None
    graph: str | None = None
    """``module:attribute`` of the graph class (``torch.cuda:CUDAGraph``); None where there are no graphs."""
    stream: str | None = None
    """``module:attribute`` of the stream class; None where there are no streams."""
    fp8_dtype: str = "float8_e4m3fn"
    """torch dtype name behind ``fp8_e4m3`` on this hardware."""
    known: tuple[Device, ...] = ()
    """Devices this platform can describe without having them; the base of ``simulate()``."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Product name -> arch, lower case: ``{"gb10": "sm_121"}``."""
    advice: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arch -> what its owner must know that no requirement of a backend says; ``attn-core doctor`` prints it."""
    specificity: int = 0
    """Two probes that report one physical device: the higher keeps it (ROCm over CUDA tools on ROCm)."""

    def __post_init__(self) -> None:
        where = f"PlatformSpec({self.name!r})"
        for name in ("name", "torch_device", "dist_backend"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise BadInputError(f"{where}: {name}={value!r} must be a non-empty string")
        object.__setattr__(self, "aliases", dict(self.aliases))
        object.__setattr__(self, "known", tuple(self.known))
        archs = {d.arch for d in self.known}
        object.__setattr__(self, "advice", {arch: tuple(texts) for arch, texts in self.advice.items()})
        if stray := sorted(set(self.advice) - archs):
            raise BadInputError(f"{where}: advice for unknown arch {stray[0]!r}; known: {sorted(archs)}")
        for d in self.known:
            if d.platform != self.name:
                raise BadInputError(f"{where}: known device {d} belongs to another platform")
        for alias, arch in self.aliases.items():
            if arch not in archs:
                raise BadInputError(f"{where}: alias {alias!r} points to unknown arch {arch!r}; known: {sorted(archs)}")

    def __hash__(self) -> int:
        return hash(self.name)
