"""S4: which backend where by default, the catalogue, page sizes (SGLang's heuristic of 2026-02, refined since)."""

from __future__ import annotations

import pytest
from asking import EVERYWHERE, ask, config

from attn_core.platform import installed_plugins

CATALOGUE = {
    "triton", "torch_native", "flex_attention", "dsa", "cutlass_mla", "fa3", "fa4", "flashinfer", "flashmla",
    "trtllm_mla", "trtllm_mha", "dual_chunk_flash_attn", "aiter", "wave", "intel_amx", "ascend", "intel_xpu",
    "fa2", "cutedsl_mla",  # which we add
}  # fmt: skip


def test_every_backend_of_the_list_is_in_the_catalogue():
    plugins = installed_plugins()
    found = set()
    for platform in plugins.platforms().values():
        catalog = plugins.catalog(platform.known)
        found |= {b.backend for d in catalog.devices.values() for b in d.backends}
    assert found >= CATALOGUE


@pytest.mark.parametrize("device", ["musa:mp31"])
@pytest.mark.parametrize("backend", ["fa3", "flashmla"])
def test_mates_kernels_have_their_names_on_musa(device, backend):
    model = "llama-3.1-8b" if backend == "fa3" else "deepseek-v3"
    answer = ask(model, device, "--decode-backend", backend)
    assert (answer.chosen()[1], answer.data["groups"]["full"]["decode"]["plugin"]) == (backend, "musa")


def test_nsa_is_another_name_for_dsa():
    for pin in ("nsa", "full=nsa"):
        assert ask("deepseek-v3.2", "cuda:sm_90", "--backend", pin).chosen() == ("dsa", "dsa")
    assert ask("deepseek-v3.2", "cuda:sm_90", "--deny", "nsa").everywhere == {"triton"}


@pytest.mark.parametrize(
    ("device", "mha", "mla"),
    [
        ("cuda:b200", {"trtllm_mha", "fa4"}, {"trtllm_mla"}),
        ("cuda:b300", {"trtllm_mha", "fa4"}, {"trtllm_mla"}),
        ("cuda:rtx5090", {"flashinfer"}, {"flashinfer"}),
        ("cuda:gb10", {"flashinfer"}, {"flashinfer"}),
        ("cuda:h100", {"fa3"}, {"fa3"}),
        ("cuda:h200", {"fa3"}, {"fa3"}),
        ("cuda:a100", {"flashinfer"}, {"triton"}),
        ("cuda:a10", {"flashinfer"}, {"triton"}),
        ("cuda:l40s", {"flashinfer"}, {"triton"}),
        ("cuda:t4", {"triton"}, {"triton"}),
        ("rocm:mi300x", {"aiter"}, {"aiter"}),
        ("rocm:mi355x", {"aiter"}, {"aiter"}),
        ("ascend:910b3", {"ascend"}, {"ascend"}),
        ("ascend:910c", {"ascend"}, {"ascend"}),
        ("xpu:b580", {"intel_xpu"}, {"intel_xpu"}),
        ("cpu:amx_bf16", {"intel_amx"}, {"intel_amx"}),
        ("cpu:avx512_bf16", {"vllm_cpu"}, {"torch_native"}),
        ("cpu:neon", {"torch_native"}, {"torch_native"}),
    ],
)
def test_defaults(device, mha, mla):
    """T4: a tile of latent rows does not fit its shared memory (docs/kernels.md), so Triton prefills there and core's
    plain kernel decodes."""
    dense, latent = ask("llama-3.1-8b", device), ask("deepseek-v3", device)
    assert dense.everywhere <= mha
    assert latent.everywhere <= mla


PRODUCTS = [
    (p.name, alias, arch) for p in installed_plugins().platforms().values() for alias, arch in p.aliases.items()
]


@pytest.mark.parametrize(("platform", "product", "arch"), PRODUCTS)
def test_a_product_is_decided_as_its_arch(platform, product, arch):
    for model in ("llama-3.1-8b", "gpt-oss-20b"):
        by_name, by_arch = (ask(model, f"{platform}:{x}") for x in (product, arch))
        assert by_name.data["device"]["arch"] == arch
        assert (by_name.data["groups"], by_name.values) == (by_arch.data["groups"], by_arch.values)


@pytest.mark.parametrize("device", ["cuda:sm_80", "cuda:sm_86", "cuda:sm_89"])
def test_ampere_and_ada_without_flashinfer_take_triton(device):
    answer = ask("llama-3.1-8b", device, "--without", "flashinfer-python")
    assert answer.chosen() == ("triton", "triton")
    (reason, *_) = answer.reasons(backend="flashinfer", role="decode", code="package")
    assert "pip install flashinfer-python" in reason["hint"] + reason["text"]


@pytest.mark.parametrize(("toolkit", "backend"), [("12.2", "flashinfer"), ("12.3", "fa3"), ("13.0", "fa3")])
def test_hoppers_fa3_needs_cuda_12_3(toolkit, backend):
    assert ask("llama-3.1-8b", "cuda:sm_90", "--with", f"cuda=={toolkit}").chosen() == (backend, backend)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_aiter_mla_where_head_counts_allow(heads):
    """128 heads over 1 to 8 ranks are 128 to 16; Kimi's 64 over 8 are 8, which are padded to 16."""
    assert ask("deepseek-v3", "rocm:mi300x", "--tensor-parallel", str(heads)).chosen() == ("aiter", "aiter")
    assert ask("kimi-k2-instruct", "rocm:mi300x", "--tensor-parallel", str(heads)).chosen() == ("aiter", "aiter")


@pytest.mark.parametrize("device", ["rocm:gfx942", "rocm:gfx950"])
def test_wave_is_selectable(device):
    assert ask("llama-3.1-8b", device, "--backend", "wave").chosen() == ("wave", "wave")
    assert "wave" not in ask("llama-3.1-8b", device).everywhere


@pytest.mark.parametrize("device", ["rocm:gfx1201", "rocm:gfx1250"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-20b"])
def test_aiters_unified_kernel_is_selectable_behind_triton(model, device):
    assert ask(model, device).everywhere == {"triton"}
    named = ask(model, device, "--backend", "aiter")
    assert named.everywhere == {"aiter"}
    assert named.data["groups"]["full"]["decode"]["tier"] == "PORTABLE"
    assert ask(model, device, "--backend", "aiter", "--without", "triton").status == 3, "it is a kernel of Triton's"


@pytest.mark.parametrize("device", ["rocm:gfx90a", "rocm:gfx1100", "rocm:gfx1151", "rocm:gfx1200"])
def test_no_kernel_of_aiters_where_sources_do_not_agree_on_it(device):
    answer = ask("llama-3.1-8b", device, "--backend", "aiter")
    assert answer.status == 3
    assert answer.reasons(backend="aiter", role="decode", field="device.arch")


def test_aiters_latent_prefill_serves_widths_the_materialised_one_lacks(tmp_path):
    wide = config(tmp_path, "deepseek-v3", qk_nope_head_dim=192, v_head_dim=256)
    for where in ("rocm:gfx942", "rocm:gfx950"):
        usual, other = (ask(m, where).data["groups"]["full"]["prefill"] for m in ("deepseek-v3", wide))
        assert [(c["backend"], c["form"]) for c in (usual, other)] == [("aiter", "materialised"), ("aiter", "absorbed")]
    assert ask(wide, "rocm:gfx942", "--lse").chosen()[0] != "aiter", "the base of its LSE is not stated"


@pytest.mark.parametrize(
    ("device", "backend", "pages"),
    [
        ("cuda:sm_90", "flashmla", {64}),
        ("cuda:sm_100", "cutlass_mla", {128}),
        ("cuda:sm_100", "trtllm_mla", {32, 64}),
        ("cuda:sm_100", "cutedsl_mla", {32, 64}),
        ("cuda:sm_121", "flashinfer", {1, 2, 16, 32, 64, 128}),
        ("cuda:sm_80", "flashinfer", {1, 16, 64}),
        ("ascend:910b", "ascend", {128}),
        ("musa:mp31", "flashmla", {64}),
        ("rocm:gfx942", "aiter", {1}),
    ],
)
def test_page_sizes_of_mla_kernels(device, backend, pages):
    for page in (1, 2, 16, 32, 64, 128, 256):
        answer = ask("deepseek-v3", device, "--decode-backend", backend, "--page-size", str(page))
        if page in pages:
            assert answer.values["page_size"] == page
            assert answer.chosen()[1] == backend
        elif backend != "flashinfer":
            assert answer.status == 3
            assert answer.reasons(backend=backend, role="decode", field="page_size", got=page)
    assert ask("deepseek-v3", device, "--decode-backend", backend).values["page_size"] in pages


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("model", ["llama-3.1-8b", "deepseek-v3", "gpt-oss-20b"])
def test_a_pinned_page_of_one_is_kept_by_choosing_who_can(model, device):
    answer = ask(model, device, "--page-size", "1", "--allow-reference")
    assert answer.status == 0
    assert answer.values["page_size"] == 1


@pytest.mark.parametrize("device", ["cuda:sm_90", "cuda:sm_100", "cuda:sm_103"])
def test_sparse_attention_chooses_its_kernel_in_the_plan(device):
    variants = ask("deepseek-v3.2", device).data["groups"]["full"]["decode"]["variants"]
    assert variants == {"flashmla_sparse": "total_kv_tokens < 512 * total_q_tokens", "flashmla_kv": "otherwise"}
