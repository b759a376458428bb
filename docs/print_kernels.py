"""Prints the tables of ``docs/kernels.md``: the Triton kernels compiled for every architecture, as compilers see them.

    python docs/print_kernels.py                          # needs triton; ten to twenty minutes on two cores

No device is needed and none is used: the launches are recorded and compiled, by tests/triton_kernels/aot.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "kernels.md"
BEGIN, END = "<!-- printed by print_kernels.py -->", "<!-- end of what is printed -->"
SHOWN = (
    "decode 128", "decode 64, sinks, window", "decode 256, softcap", "decode 128, fp8", "decode MLA", "prefill 128",
    "prefill 64, sinks, window", "prefill 256, softcap", "prefill MLA 192/128", "encode 32",
)  # fmt: skip
HEAD = "| arch | tile | warps | stages | registers | spilled | shared KiB (of) | products | instructions |"


def tables() -> list[str]:
    """One table per kernel; an architecture that its rows do not claim is named below it."""
    sys.path.insert(0, str(HERE.parent / "tests" / "triton_kernels"))
    import triton
    from aot import compiled
    from aot_cases import ARCHS, CASES, SHARED, refused

    lines = [f"Triton {triton.__version__}, 10 kernels, {len(ARCHS)} architectures.", ""]
    for name in SHOWN:
        dtype = CASES[name].spec.dtype
        lines += [f"### {name} ({dtype})", "", HEAD, "|---|---|---|---|---|---|---|---|---|"]
        for arch in ARCHS:
            if refused(name, arch):
                continue
            (launch,) = CASES[name].launches(arch)
            c, r = launch.constants, compiled(launch, arch)
            spilled = f"{r.spills} B" if arch.startswith("sm_") and r.spills else str(r.spills)
            lines.append(
                f"| {arch} | {c['BLOCK_M']} x {c['BLOCK_N']} | {c['num_warps']} | {c['num_stages']} | {r.registers} | "
                f"{spilled} | {r.shared / 1024:.0f} ({SHARED[arch]}) | {r.matrix or 'fma'} | {r.instructions} |"
            )
            print(name, lines[-1], flush=True)
        missing = [arch for arch in ARCHS if refused(name, arch)]
        lines += ["", f"Not claimed: {', '.join(missing)}.", ""] if missing else [""]
    return lines


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        printed = "\n".join(tables())
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    PAGE.write_text(f"{head}{BEGIN}\n\n{printed}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
