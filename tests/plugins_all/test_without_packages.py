"""Whatever vendor package is missing, there is an answer: another kernel, or a refusal that says what to install."""

from __future__ import annotations

import importlib
import re

import pytest
from together import ALONE, MODELS, devices

from attn_core import NoBackendError, Requirement, simulate
from attn_core.plugins import installed_packages
from dists import distribution

KNOWN = [pytest.param(name, device, id=f"{name}-{device.arch}") for name, device in devices()]
EVERY_ROLE_NAMES = ("llama-3.1-8b", "deepseek-v3", "gte-small")
EVERY_ROLE = [MODELS[m] for m in EVERY_ROLE_NAMES]
INSTRUCTION = re.compile(r"(^|[;:] )(pip install|install|build|use|upgrade) \S+")


def rejected(name, device, without):
    """(backend, role, package) -> hints, of all packages that rejections of the plugin's rows name; asking must not raise
    anything else. Core's own rows may need a package too: Triton is AITER's as well."""
    platform = simulate(device, plugins=ALONE[name], without=tuple(without))
    found: dict[tuple[str, str, str], set[str]] = {}
    for model in EVERY_ROLE:
        try:
            rejections = platform.resolve(model).rejections
        except NoBackendError as e:
            rejections = e.rejections
        for r in rejections:
            if r.code == "package" and r.plugin == name:
                found.setdefault((r.backend, r.role, r.field), set()).add(r.hint)
    return found


def needing(name, device):
    """(backend, role, package) for every requirement of every row of a plugin on a device."""
    rows = ALONE[name].catalog(device).devices[str(device)].backends
    roles = {role for m in EVERY_ROLE for g in m.groups.values() for role in g.roles} | {"allreduce_fusion"}
    return {
        (row.backend, row.role, r.name)
        for row in rows
        if row.plugin == name and row.role in roles
        for r in row.requires
        if isinstance(r, Requirement)
    }


@pytest.mark.parametrize(("name", "device"), KNOWN)
def test_each_missing_package_is_a_rejection_with_a_way_out(name, device):
    wanted = needing(name, device)
    assert wanted, "every row of a vendor needs something"
    assert not rejected(name, device, ()), "a what-if assumes that every known package is installed"
    for package in sorted({p for _, _, p in wanted}):
        found = rejected(name, device, [package])
        assert {p for _, _, p in found} == {package}
        assert set(found) == {w for w in wanted if w[2] == package}
        for hints in found.values():
            assert all(INSTRUCTION.search(h) for h in hints), hints


@pytest.mark.parametrize(("name", "device"), KNOWN)
def test_all_packages_missing_at_once(name, device):
    wanted = needing(name, device)
    assert set(rejected(name, device, sorted({p for _, _, p in wanted}))) == wanted


HOPPER, BLACKWELL, AMPERE = (next(d for n, d in devices() if n == "cuda" and d.arch == a) for a in ("sm_90", "sm_100", "sm_80"))  # fmt: skip
SGL, VLLM, UPSTREAM, FLASHINFER = "sglang-kernel", "vllm", "flash-attn-3", "flashinfer-python"
FA3 = {name: f"flash:bind_{name}_fa3" for name in ("sgl", "vllm", "upstream")}


def serving(device, model, without, **options):
    """The functions that bind prefill and decode of a model's first group (or encode), by module and name."""
    decision = simulate(device, plugins=ALONE["cuda"], without=tuple(without)).resolve(MODELS[model], **options)
    group = next(iter(decision.groups.values()))
    chosen = [c for role, c in group.choices.items() if role in ("encode", "prefill", "decode")]
    return decision, [c.bind.rpartition("kernels.")[2] for c in chosen]


@pytest.mark.parametrize("model", EVERY_ROLE_NAMES)
def test_hopper_tries_each_package_that_ships_fa3(model):
    """sglang-kernel, vLLM, FlashAttention's own; then FlashInfer."""
    tried = (((), "sgl"), ((SGL,), "vllm"), ((SGL, VLLM), "upstream"), ((VLLM, UPSTREAM), "sgl"))
    for without, expected in (*tried, ((SGL, VLLM, UPSTREAM), "")):
        decision, binds = serving(HOPPER, model, without)
        assert set(binds) == {FA3[expected]} if expected else all(b.startswith("flashinfer") for b in binds)
        assert {r.field for r in decision.rejections if (r.backend, r.code) == ("fa3", "package")} == set(without)


def test_sinks_never_go_to_the_package_without_them():
    for without, expected in (((), FA3["sgl"]), ((SGL,), FA3["vllm"])):
        assert set(serving(HOPPER, "gpt-oss-20b", without)[1]) == {expected}
    decision, _ = serving(HOPPER, "gpt-oss-20b", (SGL, VLLM))
    assert {decision.backend(role) for role in ("prefill", "decode")} == {"triton"}
    assert any(r.field == "sinks" for r in decision.rejections if r.backend == "fa3")
    with pytest.raises(NoBackendError, match="sinks"):
        serving(HOPPER, "gpt-oss-20b", (SGL, VLLM), backend="fa3")


def test_a_package_that_cannot_have_the_page_leaves_it_to_the_next():
    """vLLM's pages are multiples of 16; FlashAttention's own build reads pages of one token."""
    assert set(serving(HOPPER, "llama-3.1-8b", (SGL,), page_size=1)[1]) == {FA3["upstream"]}
    assert set(serving(HOPPER, "llama-4-scout-17b-16e", (SGL,))[1]) == {FA3["upstream"]}  # chunks, vLLM's has none


def test_ampere_is_flashinfers_then_tritons_whatever_ships_fa2():
    assert all(b.startswith("flashinfer") for b in serving(AMPERE, "llama-3.1-8b", ())[1])
    assert all("triton" in b for b in serving(AMPERE, "llama-3.1-8b", (FLASHINFER,))[1])
    for without, expected in (((), "flash:bind_vllm_fa2"), ((VLLM,), "fa2:bind")):
        decision, binds = serving(AMPERE, "llama-3.1-8b", without, backend="fa2")
        assert set(binds) == {expected}
        assert decision.values["page_size"] == (16 if expected.startswith("flash") else 256)


def test_a_cache_gets_8_bits_only_when_asked():
    """Whichever package is missing: rows that read 8 bits alone stand behind the others of their backend."""
    asked = {"kv_cache_dtype": "fp8_e4m3"}
    for without in ((), ("flash-attn-4",)):
        decision, binds = serving(BLACKWELL, "llama-3.1-8b", without, backend="fa4")
        assert decision.values["kv_cache_dtype"] == "bfloat16"
        assert set(binds) == {"flash:bind_vllm_fa4" if without else "fa4:bind"}
        assert set(serving(BLACKWELL, "llama-3.1-8b", without, backend="fa4", **asked)[1]) == {"flash:bind_vllm_fa4"}
    decision, binds = serving(HOPPER, "deepseek-v3", (), backend="flashmla")
    assert (decision.values["kv_cache_dtype"], binds[-1]) == ("bfloat16", "flashmla:bind")
    assert serving(HOPPER, "deepseek-v3", (), backend="flashmla", **asked)[1][-1] == "flashmla:bind"
    assert (
        serving(HOPPER, "deepseek-v3", ("sgl-flash-mla",), backend="flashmla", **asked)[1][-1] == "flashmla:bind_vllm"
    )


def test_a_wrapper_of_another_vendor_is_not_flash_attention_3(tmp_path, monkeypatch):
    """MATE's is a distribution named flash_attn_3 with a module flash_attn_interface, too: its extension is missing."""
    monkeypatch.syspath_prepend(tmp_path)
    catalog = ALONE["cuda"].catalog(HOPPER)

    def found():
        importlib.invalidate_caches()
        return installed_packages(catalog)

    distribution(tmp_path, "flash_attn_3", version="3.0.0", modules={"flash_attn_interface": "raise RuntimeError"})
    assert "flash_attn_3._C" in found().impostors[UPSTREAM]
    monkeypatch.syspath_prepend(tmp_path / "another")  # what is found is kept per search path
    (tmp_path / "flash_attn_3").mkdir()
    for file in ("__init__.py", "_C.abi3.so"):
        (tmp_path / "flash_attn_3" / file).touch()
    assert UPSTREAM not in found().impostors
    assert found().versions[UPSTREAM] == "3.0.0"
