"""Cases where today's engines decide wrongly. Each line of the requirements' last section, asked of the command."""

from __future__ import annotations

import json

import pytest
from asking import CUDA, EVERYWHERE, MODELS, ask, config


@pytest.mark.parametrize("model", ["olmo-2-7b", "olmo-3-7b", "exaone-4.0-32b"])
@pytest.mark.parametrize("arch", ["sm_110", "sm_120", "sm_121"])
def test_olmo_and_exaone_on_sm11x_and_sm12x_get_no_fa3(model, arch):
    answer = ask(model, f"cuda:{arch}")
    assert answer.status == 0
    assert not answer.everywhere & {"fa3", "fa4", "trtllm_mha"}


@pytest.mark.parametrize("device", ["rocm:gfx942", "musa:mp31", "xpu:bmg", "ascend:910b"])
def test_whisper_gets_no_flashinfer_off_nvidia(device):
    answer = ask("whisper-large-v3", device)
    assert answer.status == 0
    assert "flashinfer" not in answer.everywhere
    refused = ask("whisper-large-v3", device, "--backend", "flashinfer")
    assert refused.status == 3
    assert "flashinfer" in refused.data["error"]["text"]


@pytest.mark.parametrize("device", ["rocm:gfx942", "rocm:gfx950"])
@pytest.mark.parametrize("model", ["gte-small", "modernbert-base"])
def test_encoders_do_not_run_causally_on_aiter(device, model):
    assert "aiter" not in ask(model, device).everywhere
    answer = ask(model, device, "--backend", "aiter")
    assert answer.status == 3
    reasons = answer.reasons(backend="aiter", role="encode", field="attn_type")
    assert {r["group"] for r in reasons} == set(ask(model, device).data["groups"])
    assert {(r["code"], r["got"], tuple(r["allowed"])) for r in reasons} == {("feature", "encoder_only", ("decoder",))}


@pytest.mark.parametrize("device", EVERYWHERE)
def test_gemma_2s_cap_is_ignored_by_nobody(device):
    answer = ask("gemma-2-9b-it", device)
    assert answer.status == 0
    assert not answer.everywhere & {"trtllm_mha", "ascend", "intel_xpu"}


@pytest.mark.parametrize("backend", ["trtllm_mha", "fa4"])
def test_naming_one_that_ignores_caps_is_refused_with_that_reason(backend):
    answer = ask("gemma-2-9b-it", "cuda:sm_100", "--backend", backend)
    assert answer.status == 3
    reasons = answer.reasons(backend=backend, field="logit_softcap") + answer.reasons(backend=backend, code="conflict")
    assert reasons


def test_torch_native_has_caps_here():
    answer = ask("gemma-2-9b-it", "cpu:neon")
    assert answer.everywhere == {"torch_native"}


@pytest.mark.parametrize("device", EVERYWHERE)
def test_llama_3_2_visions_cross_attention_goes_to_who_has_it(device):
    answer = ask("llama-3.2-11b-vision", device)
    assert answer.status == 0
    assert not set(answer.chosen("cross")) & {"trtllm_mha", "intel_xpu", "aiter", "wave"}
    for refused in answer.reasons(group="cross", field="attn_type"):
        assert refused["got"] == "cross"


@pytest.mark.parametrize("device", ["cuda:b200", "cuda:b300"])
def test_gpt_oss_on_blackwell(device):
    answer = ask("gpt-oss-20b", device)
    assert answer.chosen("full") == answer.chosen("sliding") == ("trtllm_mha", "trtllm_mha")
    assert answer.values["page_size"] in (16, 32, 64)


def test_mimo_with_sinks_on_explicit_flashinfer():
    answer = ask("mimo-v2-flash", "cuda:sm_121", "--backend", "flashinfer")
    assert answer.status == 3
    assert answer.reasons(backend="flashinfer", group="sliding", field="sinks")


@pytest.mark.parametrize("device", ["cuda:sm_100", "cuda:sm_103"])
def test_qwen3_next_keeps_its_fast_backend(device):
    answer = ask("qwen3-next-80b-a3b", device)
    assert answer.chosen() == ("trtllm_mha", "trtllm_mha")


@pytest.mark.parametrize("device", ["rocm:gfx942", "rocm:gfx950", "rocm:gfx1100", "rocm:gfx1250"])
def test_amds_numbers_are_not_nvidias(device):
    """gfx942 is (9, 4) to torch; nothing here reads such a pair."""
    answer = ask("llama-3.1-8b", device)
    assert answer.status == 0
    assert not answer.everywhere & {"fa3", "fa4", "fa2", "flashinfer", "trtllm_mha"}
    assert not any(token.startswith(("sm_", "wgmma", "tcgen")) for token in answer.data["device"]["isa"])


def test_gfx1250_is_cdna_not_rdna():
    """Both have wmma and wave32; by prefix they would be one. MLA decode tells: RDNA4 has no room for a latent tile."""
    for arch, decode in (("gfx1250", "triton"), ("gfx1200", "torch_native"), ("gfx1201", "torch_native")):
        assert ask("deepseek-v3", f"rocm:{arch}").chosen()[1] == decode
        assert ask("llama-3.1-8b", f"rocm:{arch}").chosen() == ("triton", "triton")


@pytest.mark.parametrize("backend", ["ascend", "aiter", "intel_xpu", "intel_amx", "wave", "vllm_cpu"])
@pytest.mark.parametrize("device", ["cuda:sm_90", "cuda:sm_121"])
def test_a_foreign_backend_is_not_accepted_on_an_nvidia_gpu(backend, device):
    answer = ask("llama-3.1-8b", device, "--backend", backend)
    assert answer.status == 3
    assert f"no installed plugin offers backend '{backend}'" in answer.data["error"]["text"]


@pytest.mark.parametrize("arch", CUDA)
def test_head_dim_288_resolves_to_a_kernel_that_has_it(tmp_path, arch):
    path = config(tmp_path, "llama-3.1-8b", head_dim=288)
    answer = ask(path, f"cuda:{arch}")
    serves = "torch_native" if arch == "sm_75" else "triton"  # no room there for tiles wider than 256
    assert answer.chosen() == (serves, serves)
    assert answer.data["groups"]["full"]["decode"]["head_dim"] == 288


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2-instruct"])
def test_latent_dims_find_a_prefill_too(device, model):
    answer = ask(model, device)
    assert answer.status == 0
    assert len(answer.chosen()) == 2


@pytest.mark.parametrize("arch", [a for a in CUDA if a not in ("sm_90", "sm_100", "sm_103")])
def test_dsa_is_not_accepted_on_old_chips(arch):
    answer = ask("deepseek-v3.2", f"cuda:{arch}", "--backend", "dsa")
    assert answer.status == 3
    assert answer.reasons(backend="dsa", role="decode", field="device.arch", got=arch)


@pytest.mark.parametrize("page", [1, 16, 32, 128])
def test_an_explicit_page_size_is_never_replaced(page):
    """FlashMLA has pages of 64: pinned otherwise it is refused, not bent."""
    refused = ask("deepseek-v3", "cuda:sm_90", "--decode-backend", "flashmla", "--page-size", str(page))
    assert refused.status == 3
    assert refused.reasons(backend="flashmla", role="decode", code="pin", field="page_size", got=page)
    assert any(way.startswith(f"without page_size={page}") for way in refused.data["error"]["relaxations"])
    assert ask("deepseek-v3", "cuda:sm_90", "--page-size", str(page)).values["page_size"] == page


@pytest.mark.parametrize("page", [1, 16, 32, 64, 256])
def test_ascend_takes_pages_of_128_and_no_others(page):
    answer = ask("llama-3.1-8b", "ascend:910b", "--page-size", str(page), "--allow-reference")
    assert "ascend" not in answer.everywhere
    assert answer.reasons(backend="ascend", role="decode", field="page_size", got=page)
    assert ask("llama-3.1-8b", "ascend:910b").values["page_size"] == 128


def test_aiter_mla_takes_pages_of_one_and_no_others():
    for page in (16, 64):
        answer = ask("deepseek-v3", "rocm:gfx942", "--page-size", str(page))
        assert answer.chosen()[1] != "aiter"
        assert answer.reasons(backend="aiter", role="decode", field="page_size", got=page)
    assert ask("deepseek-v3", "rocm:gfx942").values["page_size"] == 1


def test_the_models_say_what_the_tests_take_for_granted():
    assert json.loads((MODELS / "gemma-2-9b-it.json").read_text())["attn_logit_softcapping"] == 50.0
