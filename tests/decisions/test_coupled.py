"""Coupled decisions, where vendors differ: one accepted and one refused case at least for each kind of demand."""

from __future__ import annotations

import pytest
from asking import ask, config

PAGES = [
    ("cuda:sm_90", "fa3", 1, True), ("cuda:sm_100", "trtllm_mha", 64, True), ("cuda:sm_100", "trtllm_mha", 128, False),
    ("cuda:sm_100", "fa4", 128, True), ("cuda:sm_100", "fa4", 64, False), ("musa:mp31", "fa3", 64, True),
    ("rocm:gfx942", "wave", 1, True), ("ascend:910b", "ascend", 128, True), ("ascend:910b", "ascend", 64, False),
    ("xpu:bmg", "intel_xpu", 64, True), ("xpu:bmg", "intel_xpu", 128, False), ("cpu:avx512_bf16", "vllm_cpu", 32, True),
    ("cpu:avx512_bf16", "vllm_cpu", 16, False), ("cpu:amx_bf16", "intel_amx", 1, True),
]  # fmt: skip
DTYPES = [
    ("cuda:sm_90", "fa3", "fp8_e4m3", True), ("cuda:sm_90", "fa3", "fp8_e5m2", False),
    ("cuda:sm_80", "flashinfer", "fp8_e5m2", True), ("cuda:sm_80", "flashinfer", "int8", False),
    ("musa:mp31", "fa3", "fp8_e4m3", False), ("rocm:gfx942", "aiter", "fp8_e4m3fnuz", True),
    ("rocm:gfx942", "aiter", "fp8_e4m3", False), ("rocm:gfx950", "aiter", "fp8_e4m3", True),
    ("ascend:910b", "ascend", "int8", False), ("xpu:bmg", "intel_xpu", "fp8_e5m2", True),
    ("cpu:avx512_bf16", "vllm_cpu", "fp8_e4m3", True), ("cpu:amx_bf16", "intel_amx", "fp8_e4m3", False),
]  # fmt: skip
DETERMINISTIC = [
    ("cuda:sm_90", "fa3", True), ("cuda:sm_100", "trtllm_mha", False), ("cuda:sm_80", "flashinfer", True),
    ("musa:mp31", "fa3", False), ("rocm:gfx942", "aiter", False), ("ascend:910b", "ascend", False),
    ("xpu:bmg", "intel_xpu", False), ("cuda:sm_90", "triton", True), ("cpu:neon", "torch_native", True),
]  # fmt: skip
WIDTHS = [
    ("cuda:sm_90", "fa3", 4, True), ("cuda:sm_100", "trtllm_mha", 4, True), ("ascend:910b", "ascend", 16, True),
    ("ascend:910b", "ascend", 17, False), ("xpu:bmg", "intel_xpu", 16, True), ("xpu:bmg", "intel_xpu", 17, False),
    ("cuda:sm_121", "flashinfer", 4, True), ("cpu:amx_bf16", "intel_amx", 4, False),
]  # fmt: skip


def check(device, backend, serves, *args, field):
    """Named, it serves or is refused for that field; unnamed, somebody serves."""
    answer = ask("llama-3.1-8b", device, "--decode-backend", backend, *args)
    assert (answer.status == 0) is serves
    if serves:
        assert answer.chosen()[1] == backend
    else:
        assert answer.reasons(backend=backend, role="decode", field=field) or answer.reasons(
            backend=backend, role="decode", code="conflict"
        )
    assert ask("llama-3.1-8b", device, *args, "--allow-reference").status == 0
    return answer


@pytest.mark.parametrize(("device", "backend", "page", "serves"), PAGES)
def test_page_sizes(device, backend, page, serves):
    answer = check(device, backend, serves, "--page-size", str(page), field="page_size")
    if serves:
        assert answer.values["page_size"] == page


@pytest.mark.parametrize(("device", "backend", "dtype", "serves"), DTYPES)
def test_kv_cache_dtypes(device, backend, dtype, serves):
    answer = check(device, backend, serves, "--kv-cache-dtype", dtype, field="kv_cache_dtype")
    if serves:
        assert answer.values["kv_cache_dtype"] == dtype


@pytest.mark.parametrize(("device", "backend", "serves"), DETERMINISTIC)
def test_deterministic_mode(device, backend, serves):
    check(device, backend, serves, "--deterministic", field="deterministic")


@pytest.mark.parametrize(("device", "backend", "width", "serves"), WIDTHS)
def test_speculative_verify_width(device, backend, width, serves):
    check(device, backend, serves, "--verify-width", str(width), field="verify_width")


@pytest.mark.parametrize(
    ("device", "graph", "serves"),
    [("cuda:sm_90", "full", True), ("cuda:sm_80", "full", False), ("cuda:sm_80", "decode", True),
     ("musa:mp31", "decode", False), ("musa:mp31", "piecewise", True), ("cpu:avx512_bf16", "full", False)],
)  # fmt: skip
def test_graph_modes(device, graph, serves):
    """Vendors' kernels for both phases, and how much of a step a device graph may hold."""
    default = ask("llama-3.1-8b", device)
    backend = default.chosen()[0]
    answer = ask("llama-3.1-8b", device, "--graph", graph, "--backend", backend)
    assert (answer.status == 0) is serves
    if serves:
        assert answer.values["graph"] == graph
    else:
        assert answer.reasons(backend=backend, field="graph")


@pytest.mark.parametrize("device", ["cuda:sm_90", "cuda:sm_121", "rocm:gfx942", "ascend:910b", "musa:mp31"])
def test_one_graph_mode_page_size_and_cache_dtype_for_all_groups(device):
    """Shared values are shared: models with several groups, some of which have fewer ways."""
    for model in ("gemma-2-9b-it", "gpt-oss-20b", "llama-4-scout-17b-16e", "mimo-v2-flash"):
        answer = ask(model, device)
        assert answer.status == 0
        assert set(answer.values) >= {"page_size", "kv_cache_dtype", "graph"}
        assert all("page_size" not in g["values"] for g in answer.data["groups"].values())


@pytest.mark.parametrize("model", ["qwen3-next-80b-a3b", "qwen3.5-35b-a3b", "kimi-linear-48b-a3b", "nemotron-h-8b"])
@pytest.mark.parametrize("device", ["cuda:sm_90", "cuda:sm_121", "rocm:gfx942", "ascend:910b", "xpu:bmg", "cpu:neon"])
def test_hybrid_models_are_decided_whole(model, device):
    answer = ask(model, device, "--allow-reference")
    assert answer.status == 0
    groups = answer.data["model"]["groups"]
    linear = [n for n, g in groups.items() if g.get("linear")]
    assert linear
    for name in linear:
        assert answer.data["groups"][name]["linear_decode"]["backend"] == "engine"
        assert "kv_layout" not in answer.data["groups"][name]["values"]


@pytest.mark.parametrize(
    ("device", "model", "ranks", "decode"),
    [("cuda:sm_90", "llama-3.1-8b", 8, "fa3"), ("rocm:mi300x", "deepseek-v3", 8, "aiter"),
     ("ascend:910b", "deepseek-v3", 8, "ascend"), ("cuda:b200", "deepseek-v3", 2, "trtllm_mla"),
     ("cuda:b200", "llama-3.1-8b", 16, "trtllm_mha"), ("xpu:bmg", "deepseek-v3", 8, "intel_xpu")],
)  # fmt: skip
def test_tensor_parallel_head_counts(device, model, ranks, decode):
    """Judged on one rank's heads; kv heads are replicated where there are fewer than ranks."""
    answer = ask(model, device, "--tensor-parallel", str(ranks))
    assert answer.chosen()[1] == decode


def test_more_heads_a_rank_than_a_kernel_takes(tmp_path):
    """trtllm-gen takes no 65 to 127 heads: 128 over 1 and 2 ranks are fine, Kimi's 64 too; 96 are not, on one rank."""
    for ranks in (1, 2, 4):
        assert ask("deepseek-v3", "cuda:b200", "--tensor-parallel", str(ranks)).chosen()[1] == "trtllm_mla"
    odd = config(tmp_path, "deepseek-v3", num_attention_heads=96, num_key_value_heads=96)
    refused = ask(odd, "cuda:b200", "--decode-backend", "trtllm_mla")
    assert refused.status == 3
    assert refused.reasons(backend="trtllm_mla", role="decode", field="num_heads", got=96)
    assert ask(odd, "cuda:b200").chosen()[1] != "trtllm_mla"


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_121"])
def test_deterministic_mode_takes_fusion_away(arch):
    """Sums of many ranks come in no fixed order (SGLang removes it too)."""
    ranks = ("--tensor-parallel", "2")
    role = ask("llama-3.1-8b", f"cuda:{arch}", *ranks, "--deterministic").data["roles"]["allreduce_fusion"]
    assert role["backend"] == "unfused"
    assert ask("llama-3.1-8b", f"cuda:{arch}", *ranks).data["roles"]["allreduce_fusion"]["backend"] == "flashinfer"


@pytest.mark.parametrize(
    ("device", "without", "with_kernel"),
    [("cuda:sm_90", "fa3", "flashinfer"), ("cuda:sm_80", "flashinfer", "flashinfer"), ("musa:mp31", "fa3", "fa3"),
     ("cuda:sm_100", "trtllm_mha", "trtllm_mha")],
)  # fmt: skip
def test_kv_offload_io(device, without, with_kernel):
    assert ask("llama-3.1-8b", device).chosen()[1] == without
    assert ask("llama-3.1-8b", device, "--kv-offload-io", "kernel").chosen()[1] == with_kernel
