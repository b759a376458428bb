"""What the declarations come to, beside a stand-in for core's Triton that can do anything.

S1 to S5 are the sections of the requirements these cases come from. Tests of whole decisions live in tests/decisions.
"""

from __future__ import annotations

from typing import Any

import pytest
from vendors import chosen, decide, device, rows

from attn_core import NoBackendError

CUDA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
MLA = {
    "num_heads": 20, "num_kv_heads": 20, "head_dim": 192, "v_head_dim": 128, "kind": "mla", "latent_dim": 512,
    "rope_dim": 64, "nope_dim": 128, "dtype": "bfloat16",
}  # fmt: skip


def test_capability_is_a_set_not_a_number() -> None:
    """sm_120 and sm_121 are younger than sm_100 and lack what makes it run its kernels."""
    for arch in ("sm_120", "sm_121"):
        assert not device(f"cuda:{arch}").isa & {"tcgen05", "tmem", "wgmma", "sm_100f"}
        assert device(f"cuda:{arch}").isa >= {"mma_sync", "cp_async", "tma", "fp8_mma", "fp4_mma"}
    assert {a for a in CUDA if "wgmma" in device(f"cuda:{a}").isa} == {"sm_90"}
    assert {a for a in CUDA if "tcgen05" in device(f"cuda:{a}").isa} == {"sm_100", "sm_103", "sm_110"}
    assert {a for a in CUDA if "sm_100f" in device(f"cuda:{a}").isa} == {"sm_100", "sm_103"}
    assert {a for a in CUDA if "cp_async" not in device(f"cuda:{a}").isa} == {"sm_75"}
    assert {a for a in CUDA if "fp8_mma" not in device(f"cuda:{a}").isa} == {"sm_75", "sm_80", "sm_86"}


@pytest.mark.parametrize(
    ("product", "arch"),
    [("cuda:gb10", "sm_121"), ("cuda:rtx5090", "sm_120"), ("cuda:h200", "sm_90"), ("cuda:b300", "sm_103"),
     ("cuda:l40s", "sm_89"), ("cuda:a100", "sm_80"), ("rocm:mi300x", "gfx942"), ("rocm:mi355x", "gfx950"),
     ("musa:s5000", "mp31"), ("ascend:910b3", "910b"), ("xpu:b580", "bmg")],
)  # fmt: skip
def test_products_have_archs(product: str, arch: str) -> None:
    assert device(product).arch == arch


# ---- S4: which backend where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "mha", "mla"),
    [
        ("cuda:sm_75", "triton", "triton"),
        ("cuda:sm_80", "flashinfer", "triton"),
        ("cuda:sm_86", "flashinfer", "triton"),
        ("cuda:sm_89", "flashinfer", "triton"),
        ("cuda:sm_90", "fa3", "fa3"),
        ("cuda:sm_100", "trtllm_mha", "trtllm_mla"),
        ("cuda:sm_103", "trtllm_mha", "trtllm_mla"),
        ("cuda:sm_110", "flashinfer", "triton"),
        ("cuda:sm_120", "flashinfer", "flashinfer"),
        ("cuda:sm_121", "flashinfer", "flashinfer"),
        ("rocm:gfx942", "aiter", "aiter"),
        ("rocm:gfx90a", "triton", "triton"),
        ("rocm:gfx1250", "triton", "triton"),
        ("musa:mp31", "fa3", "fa3"),
        ("musa:mp22", "triton", "triton"),
        ("ascend:910b", "ascend", "ascend"),
        ("xpu:bmg", "intel_xpu", "intel_xpu"),
        ("xpu:pvc", "triton", "triton"),
        ("cpu:amx_bf16", "intel_amx", "intel_amx"),
        ("cpu:avx512_bf16", "vllm_cpu", "triton"),
        ("cpu:neon", "triton", "triton"),
    ],
)
def test_defaults(where: str, mha: str, mla: str) -> None:
    assert chosen(decide("llama-3.1-8b", where)) == (mha, mha)
    assert chosen(decide("deepseek-v3", where)) == (mla, mla)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_ampere_without_flashinfer_is_tritons(arch: str) -> None:
    assert chosen(decide("llama-3.1-8b", f"cuda:{arch}", without=("flashinfer-python",))) == ("triton", "triton")


def test_hopper_with_an_old_toolkit_has_no_fa3() -> None:
    decision = decide("llama-3.1-8b", "cuda:sm_90", versions={"cuda": "12.2"})
    assert chosen(decision) == ("flashinfer", "flashinfer")
    assert ("version", "cuda", "12.2") in {(r.code, r.field, r.got) for r in decision.rejections if r.backend == "fa3"}
    assert chosen(decide("llama-3.1-8b", "cuda:sm_90", versions={"cuda": "12.3"})) == ("fa3", "fa3")


@pytest.mark.parametrize(("arch", "too_old", "enough"), [("sm_120", "12.7", "12.8"), ("sm_121", "12.8", "12.9")])
def test_flashinfer_needs_a_toolkit_that_knows_the_chip(arch: str, too_old: str, enough: str) -> None:
    assert chosen(decide("llama-3.1-8b", f"cuda:{arch}", versions={"cuda": too_old})) == ("triton", "triton")
    assert chosen(decide("llama-3.1-8b", f"cuda:{arch}", versions={"cuda": enough})) == ("flashinfer", "flashinfer")


@pytest.mark.parametrize(
    ("where", "backend", "page"),
    [("cuda:sm_90", "flashmla", 64), ("cuda:sm_100", "cutlass_mla", 128), ("cuda:sm_100", "trtllm_mla", 64),
     ("cuda:sm_100", "cutedsl_mla", 64), ("ascend:910b", "ascend", 128), ("rocm:gfx942", "aiter", 1),
     ("musa:mp31", "flashmla", 64), ("cpu:amx_bf16", "intel_amx", 1)],
)  # fmt: skip
def test_page_sizes_of_mla_kernels(where: str, backend: str, page: int) -> None:
    decision = decide("deepseek-v3", where, backend=backend)
    assert chosen(decision) == (backend, backend)
    assert decision.values["page_size"] == page
    assert chosen(decide("deepseek-v3", where, decode_backend=backend))[1] == backend


def test_a_pinned_page_of_one_token_finds_a_backend_that_can() -> None:
    for where, backend in (("cuda:sm_90", "fa3"), ("cuda:sm_100", "flashinfer"), ("cuda:sm_121", "flashinfer")):
        decision = decide("deepseek-v3", where, page_size=1)
        assert decision.values["page_size"] == 1
        assert chosen(decision)[1] == backend
    with pytest.raises(NoBackendError) as e:
        decide("deepseek-v3", "cuda:sm_100", page_size=1, decode_backend="trtllm_mla")
    assert ("pin", "page_size", 1) in {
        (r.code, r.field, r.got) for r in e.value.rejections if r.backend == "trtllm_mla" and r.role == "decode"
    }


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_sparse_attention_picks_its_kernel_per_step(arch: str) -> None:
    decision = decide("deepseek-v3.2", f"cuda:{arch}")
    assert chosen(decision) == ("dsa", "dsa")
    assert set(decision.groups["full"].choices["decode"].variants) == {"flashmla_sparse", "flashmla_kv"}
    assert decision.groups["full"].choices["kv_write"].backend == "dsa", "656-byte rows need their own writer"
    plain = decide("deepseek-v3.2", f"cuda:{arch}", kv_cache_dtype="bfloat16")
    assert set(plain.groups["full"].choices["decode"].variants) == {"flashmla_sparse"}


@pytest.mark.parametrize("arch", [a for a in CUDA if a not in ("sm_90", "sm_100", "sm_103")])
def test_sparse_attention_is_refused_elsewhere(arch: str) -> None:
    with pytest.raises(NoBackendError):
        decide("deepseek-v3.2", f"cuda:{arch}", backend="dsa")


# ---- S1: sinks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", CUDA)
def test_sinks_never_go_to_who_does_not_claim_them(arch: str) -> None:
    expected = {"sm_90": "fa3", "sm_100": "trtllm_mha", "sm_103": "trtllm_mha"}.get(arch, "triton")
    decision = decide("gpt-oss-20b", f"cuda:{arch}")
    assert chosen(decision, "full") == chosen(decision, "sliding") == (expected, expected)
    if arch != "sm_75":
        assert ("flashinfer", "decode", "feature", "sinks", True) in {
            (r.backend, r.role, r.code, r.field, r.got) for r in decision.rejections
        }
    with pytest.raises(NoBackendError) as e:
        decide("gpt-oss-20b", f"cuda:{arch}", backend="flashinfer")
    assert "sinks" in e.value.text


def test_sinks_may_belong_to_one_group_only() -> None:
    mixed = decide("mimo-v2-flash", "cuda:sm_121")
    assert (chosen(mixed, "full"), chosen(mixed, "sliding")) == (("flashinfer",) * 2, ("triton",) * 2)
    plain = decide("mimo-v2-flash-nosink", "cuda:sm_121")
    assert chosen(plain, "full") == chosen(plain, "sliding") == ("flashinfer", "flashinfer")


def test_kernel_driven_offload_excludes_fa3_for_decode() -> None:
    assert chosen(decide("llama-3.1-8b", "cuda:sm_90", kv_offload_io="kernel")) == ("fa3", "flashinfer")
    assert chosen(decide("deepseek-v3", "cuda:sm_90", kv_offload_io="kernel")) == ("fa3", "flashinfer")
    sinks = decide("gpt-oss-20b", "cuda:sm_90", kv_offload_io="kernel")
    assert chosen(sinks, "full")[1] == chosen(sinks, "sliding")[1] == "triton"
    assert chosen(decide("llama-3.1-8b", "cuda:sm_90", kv_offload_io="direct")) == ("fa3", "fa3")


# ---- S2: SM12x ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["trtllm_mha", "trtllm_mla"])
def test_trtllm_is_refused_on_sm12x_for_what_the_chip_lacks(backend: str) -> None:
    model = "llama-3.1-8b" if backend == "trtllm_mha" else "deepseek-v3"
    with pytest.raises(NoBackendError) as e:
        decide(model, "cuda:sm_121", prefill_backend=backend)
    reasons = [r for r in e.value.rejections if r.backend == backend and r.role == "prefill" and r.code == "isa"]
    assert reasons
    assert {"tcgen05", "tmem"} <= set(reasons[0].allowed or ())


def test_xqa_serves_sm12x_decode_unless_it_cannot() -> None:
    """Its row has pages of 16 to 128 and no LSE; FlashInfer's other decode takes over without changing the name."""
    assert decide("llama-3.1-8b", "cuda:sm_121").groups["full"].choices["decode"].backend == "flashinfer"
    for options in ({"page_size": 1}, {"lse": True}, {"deterministic": True}, {"tree_mask": True}):
        assert chosen(decide("llama-3.1-8b", "cuda:sm_121", **options)) == ("flashinfer", "flashinfer"), options
    xqa = [r for r in rows("cuda", device("cuda:sm_121")) if "xqa.py" in r.evidence]
    assert [(r.role, "sinks" in r.accepts, "lse" in r.accepts) for r in xqa] == [("decode", False, False)]


@pytest.mark.parametrize("model", ["qwen3-next-80b-a3b", "qwen3.5-35b-a3b"])
def test_hybrid_models_on_blackwell(model: str) -> None:
    assert set(chosen(decide(model, "cuda:sm_121"))) <= {"flashinfer", "triton"}
    assert chosen(decide(model, "cuda:sm_100")) == ("trtllm_mha", "trtllm_mha")
    assert set(chosen(decide(model, "cuda:sm_110"))) <= {"flashinfer", "triton"}


@pytest.mark.parametrize("arch", CUDA)
def test_allreduce_fusion(arch: str) -> None:
    def fused(ranks: int) -> bool:
        return (
            decide("llama-3.1-8b", f"cuda:{arch}", tensor_parallel=ranks).roles["allreduce_fusion"].backend
            == "flashinfer"
        )

    assert fused(2) is (arch in ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121"))
    assert not fused(1)


# ---- S3: encoders and small widths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_110", "sm_120", "sm_121"])
def test_small_encoder_is_padded_and_keeps_its_scale(arch: str) -> None:
    decision = decide("gte-small", f"cuda:{arch}")
    group = decision.groups["encoder"]
    assert chosen(decision, "encoder") == ("flashinfer",)
    assert (group.choices["encode"].head_dim, group.choices["encode"].padded_from) == (64, 32)
    assert group.values["scale"] == pytest.approx(32**-0.5)


def test_small_encoder_runs_native_where_a_kernel_can() -> None:
    for where, backend in (("cuda:sm_90", "fa3"), ("cuda:sm_100", "fa4")):
        choice = decide("gte-small", where).groups["encoder"].choices["encode"]
        assert (choice.backend, choice.padded_from) == (backend, None)


# ---- S5 and the cases engines decide wrongly ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [(320, 320), (576, 576), (1024, 1024), (256, 128)])
def test_musa_refuses_widths_mate_would_round(width: tuple[int, int]) -> None:
    spec = {"num_heads": 8, "num_kv_heads": 2, "head_dim": width[0], "v_head_dim": width[1], "dtype": "bfloat16"}
    assert chosen(decide(spec, "musa:mp31")) == ("triton", "triton")


def test_musa_refuses_what_mate_ignores() -> None:
    for options in ({"deterministic": True}, {"kv_cache_dtype": "fp8_e4m3"}):
        assert chosen(decide("llama-3.1-8b", "musa:mp31", **options)) == ("triton", "triton"), options
    assert chosen(decide("gpt-oss-20b", "musa:mp31")) == ("fa3", "fa3")
    assert chosen(decide("gpt-oss-20b", "musa:mp31", lse=True)) == ("triton", "triton")
    assert chosen(decide("llama-3.1-8b", "musa:mp31", lse=True)) == ("fa3", "fa3")
    windowed = {"num_heads": 8, "head_dim": 64, "dtype": "float16", "attn_type": "encoder_only", "sliding_window": 9}
    assert chosen(decide(windowed, "musa:mp31"), "encoder") == ("triton",)


@pytest.mark.parametrize("where", ["rocm:gfx942", "musa:mp31", "xpu:bmg"])
def test_whisper_gets_no_foreign_backend(where: str) -> None:
    decision = decide("whisper-large-v3", where)
    assert "flashinfer" not in {b for g in decision.groups for b in chosen(decision, g)}


def test_aiter_runs_no_encoder_and_drops_no_sink() -> None:
    assert chosen(decide("gte-small", "rocm:gfx942"), "encoder") == ("triton",)
    oss = decide("gpt-oss-20b", "rocm:gfx942")
    assert chosen(oss, "full") == chosen(oss, "sliding") == ("aiter", "aiter")


@pytest.mark.parametrize(
    ("heads", "backend"), [(4, "aiter"), (12, "aiter"), (16, "aiter"), (20, "triton"), (128, "aiter"), (144, "triton")]
)
def test_aiter_mla_takes_the_heads_it_can(heads: int, backend: str) -> None:
    decision = decide({**MLA, "num_heads": heads, "num_kv_heads": heads}, "rocm:gfx942")
    assert chosen(decision) == (backend, backend)


@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", "fp8_e4m3fnuz"), ("gfx950", "fp8_e4m3")])
def test_amd_fp8_is_the_chips_own(arch: str, dtype: str) -> None:
    other = "fp8_e4m3" if dtype.endswith("fnuz") else "fp8_e4m3fnuz"
    assert chosen(decide("llama-3.1-8b", f"rocm:{arch}", kv_cache_dtype=dtype)) == ("aiter", "aiter")
    assert chosen(decide("llama-3.1-8b", f"rocm:{arch}", kv_cache_dtype=other)) == ("triton", "triton")


@pytest.mark.parametrize(
    ("model", "where", "options", "never"),
    [
        ("olmo-3-7b", "cuda:sm_121", {}, "fa3"),
        ("olmo-2-7b", "cuda:sm_110", {}, "fa3"),
        ("exaone-4.0-32b", "cuda:sm_120", {}, "fa3"),
        ("gemma-2-9b-it", "cuda:sm_100", {}, "trtllm_mha"),
        ("gemma-2-9b-it", "cuda:sm_100", {}, "fa4"),
        ("gemma-2-9b-it", "ascend:910b", {}, "ascend"),
        ("llama-3.2-11b-vision", "cuda:sm_100", {}, "trtllm_mha"),
        ("llama-4-scout-17b-16e", "cuda:sm_80", {}, "fa2"),
        ("llama-3.1-8b", "ascend:910b", {"page_size": 16}, "ascend"),
        ("deepseek-v3", "rocm:gfx942", {"page_size": 64}, "aiter"),
        ("llama-3.1-8b", "cuda:sm_90", {"kv_cache_dtype": "fp8_e5m2"}, "fa3"),
    ],
)
def test_what_engines_get_wrong(model: str, where: str, options: dict[str, Any], never: str) -> None:
    decision = decide(model, where, **options)
    groups = [g for g in decision.groups if chosen(decision, g)]
    if model == "llama-3.2-11b-vision":
        groups = ["cross"]
    assert never not in {b for g in groups for b in chosen(decision, g)}


def test_head_dim_288_finds_a_kernel_that_has_it() -> None:
    spec = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 288, "dtype": "bfloat16"}
    for arch in CUDA:
        assert chosen(decide(spec, f"cuda:{arch}")) == ("triton", "triton")


def test_llama_4_chunks_only_where_a_kernel_has_them() -> None:
    assert chosen(decide("llama-4-scout-17b-16e", "cuda:sm_90"), "chunked") == ("fa3", "fa3")
    for where in ("cuda:sm_80", "cuda:sm_100", "cuda:sm_121", "rocm:gfx942", "musa:mp31"):
        assert chosen(decide("llama-4-scout-17b-16e", where), "chunked") == ("triton", "triton")


def test_310p_runs_float16_in_its_own_layout() -> None:
    decision = decide("llama-2-7b", "ascend:310p")
    assert chosen(decision) == ("ascend", "ascend")
    assert decision.groups["full"].values["kv_layout"] == "ASCEND_NZ"
    assert decision.groups["full"].choices["kv_write"].backend == "ascend"
    assert chosen(decide("llama-3.1-8b", "ascend:310p")) == ("triton", "triton"), "no bfloat16 there"


def test_an_explicit_choice_of_a_foreign_backend_is_refused() -> None:
    for backend in ("ascend", "aiter", "intel_xpu", "fa3"):
        with pytest.raises(NoBackendError):
            decide("llama-3.1-8b", "cuda:sm_121", backend=backend)
