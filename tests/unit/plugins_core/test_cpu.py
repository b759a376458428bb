"""The CPU's facts from what the operating systems say, for machines that are not here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attn_core import cpu
from attn_core.spec import Device

GENOA = """processor\t: 0
model name\t: AMD EPYC 9654 96-Core Processor
flags\t\t: fpu sse2 fma f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni
processor\t: 1
model name\t: another
flags\t\t: amx_tile
"""
SPR = (
    "model name : Intel(R) Xeon(R)\nflags : fma f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni "
    + ("avx512_fp16 avx_vnni amx_tile amx_int8 amx_bf16 amx_complex")
)
HASWELL = "model name : Core i7\nflags : fma f16c avx2"
KNL = "model name : Xeon Phi\nflags : fma f16c avx2 avx512f avx512cd"
GRAVITON3 = "CPU implementer : 0x41\nFeatures : fp asimd asimdhp asimddp sve i8mm bf16"
CORTEX_A72 = "Features : fp asimd crc32"
POWER9 = "cpu : POWER9 (architected), altivec supported"
Z15 = "vendor_id : IBM/S390\nfeatures : esan3 zarch vx vxe vxe2"
RVV = "isa : rv64imafdcv_zicbom_zvl128b"
NO_RVV = "isa : rv64imafdc_zicbom_svinval"


@pytest.mark.parametrize(
    ("text", "machine", "arch", "has", "lacks"),
    [
        (GENOA, "x86_64", "avx512_bf16", {"avx512", "avx512_vnni", "fma"}, {"amx_tile", "sse2"}),
        (SPR, "x86_64", "amx_bf16", {"amx_tile", "avx512_fp16", "avx_vnni"}, {"amx_fp16"}),
        (HASWELL, "x86_64", "avx2", {"f16c"}, {"avx512"}),
        (KNL, "x86_64", "avx2", {"avx512f"}, {"avx512"}),
        (GRAVITON3, "aarch64", "neon_bf16", {"neon", "sve", "dotprod", "fp16", "i8mm"}, {"sve2", "asimd", "bf16"}),
        (CORTEX_A72, "aarch64", "neon", {"neon"}, {"fp16"}),
        (POWER9, "ppc64le", "vsx", {"vsx"}, set()),
        (Z15, "s390x", "vxe", {"vxe"}, set()),
        (RVV, "riscv64", "rvv", {"rvv"}, set()),
        (NO_RVV, "riscv64", "riscv64", set(), {"rvv"}),
        ("", "x86_64", "x86_64", set(), {"avx2"}),
    ],
)
def test_linux(text: str, machine: str, arch: str, has: set[str], lacks: set[str]) -> None:
    tokens, _ = cpu.read_cpuinfo(text, machine)
    assert cpu.arch_of(tokens, machine) == arch
    assert tokens >= has
    assert not tokens & lacks


def test_linux_names_the_processor() -> None:
    assert cpu.read_cpuinfo(GENOA, "x86_64")[1] == "AMD EPYC 9654 96-Core Processor"
    assert cpu.read_cpuinfo(POWER9, "ppc64le")[1].startswith("POWER9")


def test_macos() -> None:
    m2 = "hw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_FP16: 1\n"
    m2 += "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_SME: 0\n"
    tokens, name = cpu.read_sysctl(m2 + "machdep.cpu.brand_string: Apple M2")
    assert (cpu.arch_of(tokens, "aarch64"), name) == ("neon_bf16", "Apple M2")
    m1 = m2.replace("FEAT_BF16: 1", "FEAT_BF16: 0")
    assert cpu.arch_of(cpu.read_sysctl(m1)[0], "aarch64") == "neon"
    intel = "hw.optional.avx2_0: 1\nhw.optional.fma: 1\nhw.optional.f16c: 1"
    assert cpu.arch_of(cpu.read_sysctl(intel)[0], "x86_64") == "avx2"


def test_this_machine_fits_the_platform() -> None:
    here = cpu.probe()
    assert here.platform == "cpu"
    assert here.total_memory is None or here.total_memory > 2**20
    assert here.isa >= set(cpu.LEVELS.get(here.arch, ()))


def test_what_the_system_does_not_tell_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> str:
        raise OSError

    monkeypatch.setattr(cpu.Path, "read_text", missing)
    monkeypatch.setattr(cpu.os, "sysconf", missing)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "ARM64")
    assert cpu.probe() == Device(platform="cpu", arch="neon", isa=frozenset({"neon"}), name="aarch64")


def test_known_levels_name_themselves() -> None:
    """A simulated CPU has exactly the tokens its arch implies, and would be called by that name again."""
    for d in cpu.PLATFORM.known:
        assert cpu.arch_of(d.isa, "none") == d.arch
    assert set(cpu.PLATFORM.aliases.values()) <= set(cpu.LEVELS)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys; from attn_core import cpu; cpu.probe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
