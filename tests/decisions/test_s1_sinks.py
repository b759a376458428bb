"""S1: a model with attention sinks never reaches a kernel without them (sgl-project/sglang PR 23139)."""

from __future__ import annotations

import json

import pytest
from asking import CUDA, EVERYWHERE, MODELS, ask, claimants, config

CLAIMS = {
    "cuda": {"fa3", "fa4", "trtllm_mha", "flashinfer_sinks"}, "musa": {"fa3"}, "rocm": {"aiter"}, "ascend": {"ascend"},
    "xpu": {"intel_xpu"}, "cpu": {"vllm_cpu", "intel_amx"},
}  # fmt: skip
"""Vendors' backends whose source shows sinks; core's own kernels have them everywhere."""
CORE = {"triton", "flex_attention", "torch_native"}


def test_1_gpt_oss_has_sinks_always():
    for group in ask("gpt-oss-20b", "cuda:sm_90").data["model"]["groups"].values():
        assert group["sinks"] is True


@pytest.mark.parametrize(("swa", "full"), [(True, False), (False, True), (True, True), (False, False)])
def test_1_mimo_has_sinks_where_its_flags_say_so(tmp_path, swa, full):
    """Not by its name: flags in the text config, one per kind of layer."""
    flags = {"add_swa_attention_sink_bias": swa, "add_full_attention_sink_bias": full}
    answer = ask(config(tmp_path, "mimo-v2-flash", **flags), "cuda:sm_121")
    groups = answer.data["model"]["groups"]
    assert (groups["sliding"]["sinks"], groups["full"]["sinks"]) == (swa, full)
    assert answer.chosen("sliding") == (("triton",) * 2 if swa else ("flashinfer",) * 2)
    assert answer.chosen("full") == (("triton",) * 2 if full else ("flashinfer",) * 2)


@pytest.mark.parametrize("swa", [True, False])
def test_1_mimos_draft_layers_likewise(tmp_path, swa):
    flags = {"architectures": ["MiMoV2MTP"], "model_type": "mimo_v2_mtp"}
    flags |= {"add_swa_attention_sink_bias": swa, "add_full_attention_sink_bias": False}
    answer = ask(config(tmp_path, "mimo-v2-flash", **flags), "cuda:sm_80")
    assert {g["sinks"] for g in answer.data["model"]["groups"].values()} == {swa}


def test_1_a_generic_flag_counts_too(tmp_path):
    answer = ask(config(tmp_path, "llama-3.1-8b", learnable_sink=True), "cuda:sm_121")
    assert answer.data["model"]["groups"]["full"]["sinks"] is True
    assert answer.chosen() == ("triton", "triton")


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("model", ["gpt-oss-20b", "mimo-v2-flash"])
def test_2_no_automatic_path_gives_sinks_to_who_does_not_claim_them(model, device):
    answer = ask(model, device)
    assert answer.status == 0
    groups = answer.data["model"]["groups"]
    allowed = CLAIMS[device.partition(":")[0]] | CORE
    for name in answer.data["groups"]:
        if groups[name]["sinks"]:
            assert set(answer.chosen(name)) <= allowed


PATHS = [
    ("--deterministic",), ("--lse",), ("--kv-offload-io", "kernel"), ("--page-size", "1"), ("--page-size", "128"),
    ("--tensor-parallel", "8"), ("--uniform", "groups"), ("--uniform", "all"), ("--graph", "decode"),
    ("--kv-cache-dtype", "fp8_e5m2"), ("--kv-cache-dtype", "fp8_e4m3"), ("--verify-width", "4", "--tree-mask"),
    ("--without", "sglang-kernel"), ("--without", "triton"), ("--deny", "triton", "--deny", "fa3"),
    ("--with", "cuda==12.2"), ("--host-lengths", "bounds"),
]  # fmt: skip
"""What an engine may ask for on the way to a decision it did not pin."""


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
@pytest.mark.parametrize("model", ["gpt-oss-20b", "mimo-v2-flash"])
def test_2_nor_does_any_option_lead_there(model, path):
    """Judged by the rows themselves: what serves a group with sinks has a row for that role that claims them."""
    for device in EVERYWHERE:
        answer = ask(model, device, *path, "--allow-reference")
        if answer.status == 3:  # a refusal drops no sinks
            continue
        for name, group in answer.data["model"]["groups"].items():
            for role in ("prefill", "decode") if group["sinks"] else ():
                backend = answer.data["groups"][name][role]["backend"]
                assert backend in claimants(device, role, sinks=True), (device, name, role)
                assert backend != "flashinfer_sinks", "which is for who names it"


def test_2_the_judgement_above_can_tell():
    assert "flashinfer" not in claimants("cuda:sm_90", "decode", sinks=True)
    assert {"fa3", "triton"} <= claimants("cuda:sm_90", "decode", sinks=True)


@pytest.mark.parametrize("arch", [a for a in CUDA if a not in ("sm_90", "sm_100", "sm_103")])
def test_2_without_a_claiming_vendor_kernel_triton_serves(arch):
    answer = ask("gpt-oss-20b", f"cuda:{arch}")
    assert answer.chosen("full") == answer.chosen("sliding") == ("triton", "triton")


def test_2_flashinfers_plain_wrappers_do_not_claim_sinks():
    answer = ask("gpt-oss-20b", "cuda:sm_80")
    (reason, *_) = answer.reasons(backend="flashinfer", role="decode", group="full", field="sinks")
    assert (reason["code"], reason["got"], reason["allowed"]) == ("feature", True, [False])
    assert reason["text"] == "does not support sinks=true"


@pytest.mark.parametrize(
    ("model", "decode"), [("llama-3.1-8b", "flashinfer"), ("deepseek-v3", "flashinfer"), ("gpt-oss-20b", "triton")]
)
def test_3_kernel_driven_offload_excludes_fa3_for_decode(model, decode):
    answer = ask(model, "cuda:sm_90", "--kv-offload-io", "kernel")
    assert answer.chosen()[1] == decode
    assert answer.reasons(backend="fa3", role="decode", field="kv_offload_io")
    for other in ("none", "direct"):
        assert ask(model, "cuda:sm_90", "--kv-offload-io", other).chosen()[1] == "fa3"


def test_3_naming_fa3_for_decode_under_kernel_driven_offload_is_refused():
    answer = ask("llama-3.1-8b", "cuda:sm_90", "--kv-offload-io", "kernel", "--decode-backend", "fa3")
    assert answer.status == 3
    assert answer.reasons(backend="fa3", role="decode", field="kv_offload_io", got="kernel")


@pytest.mark.parametrize("device", EVERYWHERE)
def test_4_models_without_sinks_decide_as_if_sinks_were_unheard_of(device):
    """MiMo with both flags off is a model like any other: nothing about it depends on its name."""
    answer = ask("mimo-v2-flash-nosink", device)
    assert answer.status == 0
    refused = {r["backend"] for r in answer.reasons(field="sinks")}
    assert refused <= {"flashinfer_sinks"}, "which is for models with sinks only"


@pytest.mark.parametrize("device", [f"cuda:{arch}" for arch in CUDA])
@pytest.mark.parametrize("model", ["gpt-oss-20b", "mimo-v2-flash"])
def test_4_explicit_flashinfer_for_a_sink_group_is_refused_with_the_alternatives(model, device):
    answer = ask(model, device, "--backend", "flashinfer")
    assert answer.status == 3
    error = answer.data["error"]
    assert error["code"] == "no_backend"
    assert answer.reasons(backend="flashinfer", field="sinks") or device == "cuda:sm_75"
    (way,) = (w for w in error["relaxations"] if w.startswith("without backend=flashinfer: "))
    assert any(name in way for name in CLAIMS["cuda"] | CORE)


def test_4_of_a_model_with_one_sink_group_only_that_group_is_in_the_way():
    answer = ask("mimo-v2-flash", "cuda:sm_80", "--backend", "flashinfer")
    assert {r["group"] for r in answer.reasons(backend="flashinfer", field="sinks")} == {"sliding"}
    pinned = ask("mimo-v2-flash", "cuda:sm_80", "--backend", "full=flashinfer")
    assert (pinned.chosen("full"), pinned.chosen("sliding")) == (("flashinfer",) * 2, ("triton",) * 2)


def test_the_files_say_what_the_tests_take_for_granted():
    flags = ("add_swa_attention_sink_bias", "add_full_attention_sink_bias")
    assert any(json.loads((MODELS / "mimo-v2-flash.json").read_text()).get(f) for f in flags)
    assert not any(json.loads((MODELS / "mimo-v2-flash-nosink.json").read_text()).get(f) for f in flags)
