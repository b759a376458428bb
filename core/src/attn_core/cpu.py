"""The host CPU as a platform: its facts, and a probe that reads them from the operating system. No torch.

Tokens are sets of instructions a kernel may need. An arch is a name for a level of them; a real CPU usually has more
tokens than its arch implies, and rows ask for tokens.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from attn_core.spec import Device, PlatformSpec

_AVX2 = ("avx2", "f16c", "fma")
_AVX512 = (*_AVX2, "avx512", "avx512bw", "avx512dq", "avx512f", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16", "avx512_vnni")
_AMX = (*_AVX512_BF16, "amx_bf16", "amx_int8", "amx_tile", "avx512_fp16")
_NEON_BF16 = ("dotprod", "fp16", "i8mm", "neon", "neon_bf16")

LEVELS: Mapping[str, tuple[str, ...]] = {
    "amx_fp16": (*_AMX, "amx_fp16"),
    "amx_bf16": _AMX,
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon_bf16": _NEON_BF16,
    "neon": ("neon",),
    "vsx": ("vsx",),
    "vxe": ("vxe",),
    "rvv": ("rvv",),
}
"""Arch -> the tokens it implies, best first. A CPU's arch is the first whose tokens it all has."""

_LINUX = {"asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "bf16": "neon_bf16", "altivec": "vsx"}
"""Linux's names where they differ from the tokens; ``bf16`` is Arm's there, x86 says ``avx512_bf16``."""
_DARWIN = {
    "FEAT_FP16": "fp16", "FEAT_DotProd": "dotprod", "FEAT_BF16": "neon_bf16", "FEAT_I8MM": "i8mm", "AdvSIMD": "neon",
    "avx2_0": "avx2", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
}  # fmt: skip
_TOKENS = frozenset(t for tokens in LEVELS.values() for t in tokens) | {"avx_vnni", "sve", "sve2"}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}

PLATFORM = PlatformSpec(
    name="cpu",
    torch_device="cpu",
    dist_backend="gloo",
    known=tuple(Device(platform="cpu", arch=arch, isa=frozenset(tokens)) for arch, tokens in LEVELS.items()),
    aliases={
        "sapphire_rapids": "amx_bf16",
        "granite_rapids": "amx_fp16",
        "genoa": "avx512_bf16",
        "graviton3": "neon_bf16",
    },
    specificity=-1,
)
"""Below every accelerator's specificity, so that the CPU comes last."""


def probe() -> Device:
    """This machine's CPU: tokens, name and the memory this process may use. What cannot be read stays unknown."""
    machine = platform.machine().lower() or "unknown"
    machine = _MACHINES.get(machine, machine)
    if sys.platform == "darwin":
        tokens, name = read_sysctl(_sysctl())
    else:
        text = ""
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        tokens, name = read_cpuinfo(text, machine)
    if machine == "aarch64":
        tokens |= {"neon"}  # every 64-bit Arm has it
    return Device(
        platform="cpu", arch=arch_of(tokens, machine), isa=tokens, name=name or machine, total_memory=_memory()
    )


def arch_of(tokens: frozenset[str], machine: str) -> str:
    """The best level a CPU has all tokens of, or its machine name when it has none."""
    return next((arch for arch, implied in LEVELS.items() if tokens >= set(implied)), machine)


def read_cpuinfo(text: str, machine: str) -> tuple[frozenset[str], str]:
    """Tokens and name from the first processor in Linux's ``/proc/cpuinfo`` (x86, Arm, POWER, Z, RISC-V)."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip().lower(), value.strip())
    flags = f"{facts.get('flags', '')} {facts.get('features', '')}".lower().split()
    tokens = {_LINUX.get(f, f) for f in flags}
    if machine.startswith("ppc64") and "altivec" in facts.get("cpu", "").lower():
        tokens.add("vsx")  # POWER8 and later, the only ones that run 64-bit little-endian Linux
    if machine.startswith("riscv") and "v" in facts.get("isa", "").split("_")[0].removeprefix("rv64"):
        tokens.add("rvv")
    name = facts.get("model name") or facts.get("cpu model") or facts.get("cpu") or ""
    return _vocabulary(tokens), name


def read_sysctl(text: str) -> tuple[frozenset[str], str]:
    """Tokens and name from macOS's ``sysctl hw.optional machdep.cpu.brand_string``."""
    tokens: set[str] = set()
    name = ""
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "machdep.cpu.brand_string":
            name = value
        elif value == "1":
            last = key.rpartition(".")[2]
            tokens.add(_DARWIN.get(last, last))
    return _vocabulary(tokens), name


def _vocabulary(tokens: set[str]) -> frozenset[str]:
    known = tokens & _TOKENS
    return frozenset(known | {"avx512"} if known >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"} else known)


def _sysctl() -> str:
    command = ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu.brand_string"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    return ""


def _memory() -> int | None:
    """Bytes of memory, or the container's limit when that is lower; None where the system does not tell."""
    sizes = []
    with suppress(OSError, ValueError, AttributeError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((s for s in sizes if s > 0), default=None)
