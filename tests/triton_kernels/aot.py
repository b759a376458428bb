"""Compiles the kernels for architectures that are not here: what the product would launch, recorded, then compiled.

A step is planned and called on CPU tensors with the launches recorded instead of run. Their arguments give the types
and the divisibility that Triton's own launcher would specialise on, so nothing is assumed about the kernels twice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_core.backends.triton import kv_write, launch, merge_state

WAVE64 = {"gfx90a", "gfx942", "gfx950"}
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Launch:
    """One recorded launch."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel: Any, seen: list[Launch]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **constants: self.seen.append(Launch(self.kernel, args, constants, grid))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of the backend go to the list it yields."""
    seen: list[Launch] = []
    places = [(launch, "attend"), (launch, "merge"), (kv_write, "write"), (kv_write, "gather")]
    places.append((merge_state, "join"))
    kernels = [getattr(module, name) for module, name in places]
    for (module, name), kernel in zip(places, kernels):
        setattr(module, name, Recorder(kernel, seen))
    try:
        yield seen
    finally:
        for (module, name), kernel in zip(places, kernels):
            setattr(module, name, kernel)


@dataclass(frozen=True)
class Resources:
    """What the compiler says of one kernel."""

    registers: int
    spills: int
    """Registers spilled (AMD), or bytes of stack (NVIDIA)."""
    shared: int
    """Bytes."""
    matrix: str
    """The matrix instruction used, empty when none."""
    instructions: int


def target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch in WAVE64 else 32)


def source(made: Launch) -> ASTSource:
    """The launch as Triton's launcher would specialise it."""
    names = made.kernel.arg_names
    values = dict(zip(names, made.args)) | {k: v for k, v in made.constants.items() if k not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or name in made.constants or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(made.kernel, signature, constants, attributes)


def compiled(made: Launch, arch: str) -> Resources:
    """Compile one launch. Raises what the compiler raises."""
    options = {k: v for k, v in made.constants.items() if k in OPTIONS}
    binary = triton.compile(source(made), target=target(arch), options=options)
    shared = binary.metadata.shared
    if arch.startswith("sm_"):
        text = binary.asm["ptx"]
        registers, stack = _cuda_usage(binary.asm["cubin"])
        matrix = re.search(r"(tcgen05\.mma|wgmma\.mma_async|mma\.sync)", text)
        count = len(re.findall(r"^\s+(?:@\S+ )?[a-z][\w.]*.*;", text, re.M))
        return Resources(registers, stack, shared, matrix.group() if matrix else "", count)
    text = binary.asm["amdgcn"]
    (registers,), (vector,), (_scalar,) = (
        [int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", text)]
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    matrix = re.search(r"v_(mfma|wmma|smfmac|swmmac)", text)
    return Resources(
        registers, vector, shared, matrix.group() if matrix else "", len(re.findall(r"^\t[sv]_", text, re.M))
    )


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack. (The field that is called LOCAL stays 0.)"""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        said = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()
    return int(registers), int(stack)
