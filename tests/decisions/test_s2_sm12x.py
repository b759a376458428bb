"""S2: SM12x is not a bigger SM100 (sgl-project/sglang PR 18758; FlashInfer 0.7.2)."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from asking import CUDA, MODELS, ask

from attn_core import ModelSpec, cli, simulate

SM12X = ("cuda:sm_120", "cuda:sm_121")
HYBRID = ("qwen3-next-80b-a3b", "qwen3.5-35b-a3b")


@pytest.mark.parametrize("device", SM12X)
@pytest.mark.parametrize(("backend", "model"), [("trtllm_mha", "llama-3.1-8b"), ("trtllm_mla", "deepseek-v3")])
def test_1_trtllm_prefill_is_refused_for_what_the_chip_lacks(device, backend, model):
    answer = ask(model, device, "--prefill-backend", backend)
    assert answer.status == 3
    (reason, *_) = answer.reasons(backend=backend, role="prefill", code="isa")
    assert {"tcgen05", "tmem"} <= set(reason["allowed"])
    assert "tcgen05" in reason["text"]


@pytest.mark.parametrize("device", [f"cuda:{a}" for a in CUDA if a not in ("sm_100", "sm_103")])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-20b", "deepseek-v3"])
def test_1_trtllm_gen_is_for_the_sm_100_family_only(device, model):
    assert not ask(model, device).everywhere & {"trtllm_mha", "trtllm_mla", "cutedsl_mla"}


@pytest.mark.parametrize("device", ["cuda:gb10", "cuda:rtx5090"])
def test_1_decode_through_xqa_is_a_promise_of_its_own(device):
    """It is FlashInfer's decode, under its own name, where its pages and features serve."""
    answer = ask("llama-3.1-8b", device)
    decode = answer.data["groups"]["full"]["decode"]
    assert (decode["backend"], list(decode["variants"])) == ("flashinfer", ["xqa"])
    assert answer.values["page_size"] in (16, 32, 64, 128)
    plain = ask("llama-3.1-8b", device, "--page-size", "1").data["groups"]["full"]["decode"]
    assert (plain["backend"], list(plain["variants"])) == ("flashinfer", ["fa2"])


@pytest.mark.parametrize("device", SM12X)
@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-2-7b", "qwen2.5-0.5b", "qwen3-8b"])
def test_2_dense_mha_takes_flashinfer_for_both_phases(device, model):
    answer = ask(model, device)
    assert answer.chosen() == ("flashinfer", "flashinfer")
    assert list(answer.data["groups"]["full"]["prefill"]["variants"]) == ["fa2"]
    assert {"triton"} <= set(answer.data["eligible"]["full.prefill"])


@pytest.mark.parametrize("device", SM12X)
@pytest.mark.parametrize("model", ["gte-small", "modernbert-base"])
def test_2_fa2_prefill_is_causal_and_not(device, model):
    """Encoders too, but those with a window on both sides, of which its plan counts one: one width for both groups."""
    expected = {"gte-small": {"flashinfer"}, "modernbert-base": {"triton"}}[model]
    assert ask(model, device).everywhere == expected


@pytest.mark.parametrize("device", SM12X)
@pytest.mark.parametrize("model", ["deepseek-v2-lite", "deepseek-v3", "kimi-k2-instruct"])
def test_2_mla_takes_flashinfer_before_triton(device, model):
    answer = ask(model, device)
    assert answer.chosen() == ("flashinfer", "flashinfer")
    assert list(answer.data["groups"]["full"]["decode"]["variants"]) == ["fa2"]


@pytest.mark.parametrize("device", SM12X)
def test_2_decode_under_kernel_driven_offload_takes_flashinfer(device):
    assert ask("llama-3.1-8b", device, "--kv-offload-io", "kernel").chosen()[1] == "flashinfer"


@pytest.mark.parametrize("model", HYBRID)
def test_3_full_layers_of_hybrid_models(model):
    for device in SM12X:
        assert ask(model, device).everywhere_full <= {"triton", "flashinfer"}
        for backend in ("triton", "flashinfer"):
            assert ask(model, device, "--backend", backend).chosen() == (backend, backend)
        assert ask(model, device, "--prefill-backend", "trtllm_mha").status == 3
    for device in ("cuda:sm_100", "cuda:sm_103"):
        assert ask(model, device).chosen() == ("trtllm_mha", "trtllm_mha")
        assert ask(model, device, "--backend", "triton").chosen() == ("triton", "triton")
    assert ask(model, "cuda:sm_110").everywhere_full <= {"triton", "flashinfer"}
    assert ask(model, "cuda:sm_110", "--backend", "trtllm_mha").status == 3


@pytest.mark.parametrize("model", HYBRID)
@pytest.mark.parametrize("device", [*SM12X, "cuda:sm_90", "cuda:sm_100"])
def test_3_linear_layers_are_the_engines_whatever_attends(model, device):
    for args in ((), ("--backend", "triton")):
        linear = ask(model, device, *args).data["groups"]["linear"]
        assert {linear[r]["backend"] for r in ("linear_prefill", "linear_decode")} == {"engine"}


@pytest.mark.parametrize("arch", CUDA)
def test_4_allreduce_fusion(arch):
    """Compiled for SM90, SM10x and SM12x; and with one rank there is nothing to reduce."""

    def fuses(ranks):
        answer = ask("llama-3.1-8b", f"cuda:{arch}", "--tensor-parallel", str(ranks))
        return answer.data["roles"]["allreduce_fusion"]["backend"] == "flashinfer"

    assert fuses(2) is fuses(8) is (arch in ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121"))
    assert not fuses(1)


@pytest.mark.parametrize("arch", CUDA)
def test_5_cutlass_mla_is_for_the_sm_100_family(arch):
    answer = ask("deepseek-v3", f"cuda:{arch}", "--decode-backend", "cutlass_mla")
    assert answer.status == (0 if arch in ("sm_100", "sm_103") else 3)
    if answer.status == 0:
        assert answer.values["page_size"] == 128
    else:
        assert answer.reasons(backend="cutlass_mla", role="decode", code="isa")


def test_5_capability_is_a_set_no_number_decides():
    """A made-up SM 13.0 with nothing known of it runs what needs no token, and nothing of Hopper or Blackwell."""
    known = simulate("cuda:sm_121")
    unheard = replace(known.device, arch="sm_130", isa=frozenset())
    decision = simulate(unheard).resolve(ModelSpec.from_hf_config(MODELS / "llama-3.1-8b.json"))
    assert {c.backend for c in decision.groups["full"].choices.values()} <= {"triton", "flex_attention", "torch_native"}


def doctor(*args):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "answer", lambda: printed)
        cli.main(["doctor", *args])
    return printed.getvalue()


def test_6_doctor_says_what_sm_121_needs():
    said = json.loads(doctor("--device", "cuda:gb10", "--json"))
    assert [d["arch"] for d in said["devices"]] == ["sm_121"]
    advice = " ".join(said["advice"]["cuda:sm_121"])
    for word in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "CUDA 13", "sm_12x", "wheels"):
        assert word in advice
    flashinfer = [p for p in said["packages"] if "flashinfer" in p["backends"]]
    assert any(p["requires"] == "cuda>=12.9" for p in flashinfer)
    assert "TRITON_PTXAS_PATH" in " ".join(doctor("--device", "cuda:sm_121").split())
    assert not json.loads(doctor("--device", "cuda:sm_90", "--json"))["advice"]


def test_6_an_old_toolkit_is_a_reason_with_what_to_do():
    answer = ask("llama-3.1-8b", "cuda:sm_121", "--with", "cuda==12.8")
    assert answer.chosen() == ("triton", "triton")
    (reason, *_) = answer.reasons(backend="flashinfer", role="prefill", field="cuda")
    assert (reason["code"], reason["got"]) == ("version", "12.8")
    assert "12.9" in reason["text"] + reason["hint"]
