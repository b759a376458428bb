"""What every vendor plugin owes the core and its readers, whatever it says about kernels."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from vendors import NAMES, PLATFORMS, PLUGINS, known, rows, rules

from attn_core.plugins.validate import check_item
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec, Requirement

KNOWN = [pytest.param(name, dev, id=f"{name}-{dev.arch}") for name, dev in known()]
BACKENDS = {
    "cuda": {
        "flashinfer", "fa2", "fa3", "fa4", "trtllm_mha", "trtllm_mla", "cutlass_mla", "cutedsl_mla", "flashmla", "dsa",
        "dual_chunk_flash_attn",
        "flashinfer_sinks",  # no engine's name: what FlashInfer's sink wrapper serves, for who asks for it
    },
    "musa": {"fa3", "flashmla"},
    "rocm": {"aiter", "wave"},
    "ascend": {"ascend"},
    "intel": {"intel_xpu", "intel_amx", "vllm_cpu"},
}  # fmt: skip
HEAVY = (
    "torch", "triton", "numpy", "pynvml", "pymtml", "amdsmi", "torch_musa", "torch_npu", "mate", "aiter", "flashinfer",
    "flash_attn", "flash_mla", "sgl_kernel", "vllm", "sglang", "vllm_xpu_kernels", "wave_lang", "cutlass", "tilelang",
)  # fmt: skip


@pytest.mark.parametrize(("name", "dev"), KNOWN)
def test_every_declaration_is_plain_data_for_the_device_it_was_asked_about(name: str, dev: Device) -> None:
    found = rows(name, dev)
    assert found
    for row in found:
        check_item(row, BackendSpec)
        assert row.platform == dev.platform
    for rule in rules(name, dev):
        check_item(rule, Constraint)
    assert len({r.content for r in found}) == len(found), "two equal rows: one of them says nothing"


@pytest.mark.parametrize(("name", "dev"), KNOWN)
def test_every_row_names_its_sources_and_what_it_binds(name: str, dev: Device) -> None:
    for row in rows(name, dev):
        assert len(row.evidence) > 20, row
        if row.bind is not None:
            module, _, function = row.bind.partition(":")
            assert module.startswith(f"attn_plugin_{name}.kernels."), row.bind
            assert callable(getattr(importlib.import_module(module), function)), row.bind
        assert row.requires, f"{row.backend} {row.role} would be offered on a machine without its kernels"
    for rule in rules(name, dev):
        assert rule.because
        assert rule.evidence


@pytest.mark.parametrize(("name", "dev"), KNOWN)
def test_requirements_are_provable_and_tell_how_to_meet_them(name: str, dev: Device) -> None:
    toolkits = set(dev.versions)
    for row in rows(name, dev):
        for r in row.requires:
            assert isinstance(r, Requirement)
            assert r.install, r.spec
            assert not re.search(r"https?:|\bindex-url\b", r.install), "hints name packages, not hosts"
            # AMX: other builds of the package have the same modules, so only its name tells
            assert r.symbols or r.name in toolkits or r.name == "sglang-kernel-cpu", r.spec
            if r.written_for:
                assert r.admits(r.written_for), f"a what-if assumes {r.written_for}, which {r.spec} refuses"


def test_each_plugin_uses_the_names_engines_know() -> None:
    for name, expected in BACKENDS.items():
        assert {r.backend for plugin, dev in known() if plugin == name for r in rows(name, dev)} == expected


@pytest.mark.parametrize(("name", "dev"), KNOWN)
def test_a_rule_speaks_only_of_backends_its_plugin_has(name: str, dev: Device) -> None:
    own = {(r.role, r.backend) for r in rows(name, dev)}
    for rule in rules(name, dev):
        for role in ("encode", "prefill", "decode"):
            for side in (rule.when, rule.then):
                if role in side:
                    assert {(role, v) for v in side[role].values or ()} <= own, rule.name


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_says_nothing_about_foreign_devices(name: str) -> None:
    own = {"intel": {"xpu", "cpu"}}.get(name, {name})
    for _, dev in known():
        if dev.platform not in own:
            assert rows(name, dev) == []
            assert rules(name, dev) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_arch_that_came_after_the_table_is_no_error(name: str) -> None:
    """A newer chip gets rows that all need tokens it does not show, or that do not list it."""
    dev = Device(platform="xpu" if name == "intel" else name, arch="of_tomorrow")
    offered = [r for r in rows(name, dev) if not r.needs and dev.arch in r.accepts.get("device.arch", [dev.arch])]
    assert offered == []


@pytest.mark.parametrize("spec", PLATFORMS.values(), ids=PLATFORMS)
def test_platforms_name_what_torch_calls_them(spec: PlatformSpec) -> None:
    check_item(spec, PlatformSpec)
    assert spec.torch_device == {"rocm": "cuda", "ascend": "npu"}.get(spec.name, spec.name)
    assert all(a == a.lower() and a.strip() for a in spec.aliases)
    assert not set(spec.aliases) & {d.arch for d in spec.known}, "a product named like an arch would be ambiguous"
    for entry in (spec.graph, spec.stream):
        assert entry is None or re.fullmatch(r"[\w.]+:\w+", entry)


def test_rocm_and_musa_keep_devices_that_cuda_tools_also_show() -> None:
    assert PLATFORMS["rocm"].specificity > PLATFORMS["cuda"].specificity
    assert PLATFORMS["musa"].specificity > PLATFORMS["cuda"].specificity


def test_declaring_and_probing_import_nothing_heavy() -> None:
    """In a fresh process, with every hook called for every known device."""
    code = f"""
import sys, importlib
before = set(sys.modules)
for name in {NAMES!r}:
    m = importlib.import_module("attn_plugin_" + name)
    for p in m.attn_platforms():
        for d in p.known:
            list(m.attn_backends(device=d)); list(getattr(m, "attn_constraints", lambda device: ())(device=d))
heavy = sorted(m for m in sys.modules if m.split(".")[0] in {HEAVY!r})
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=_environ())


def _environ() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)}


def test_hooks_are_marked_and_nothing_else_looks_like_one() -> None:
    for module in PLUGINS.values():
        hooks = [n for n in dir(module) if n.startswith("attn_")]
        assert {"attn_platforms", "attn_probe_devices", "attn_backends"} <= set(hooks)
        assert all(hasattr(getattr(module, n), "attn_core_impl") for n in hooks)


def test_rows_differ_when_anything_about_them_does() -> None:
    """Guard of the test above on equal rows: content sees evidence too."""
    row = rows("musa", next(iter(PLATFORMS["musa"].known)))[0]
    assert replace(row, evidence="another").content != row.content
