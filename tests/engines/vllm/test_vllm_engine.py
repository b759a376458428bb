"""Whole vLLM engines on the CPU: greedy tokens are transformers' and vLLM's own, and stop being so when something that
matters is dropped. Every engine of ours is proven to have run our kernels by its notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_models as toys

LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BHLNC", "LHBNC", "BLHNC")
TORCH = {"additional_config": {"attn_core": {"deny": ["vllm_cpu"]}}}
"""The kernels that need nothing but torch; left alone, vLLM's own are chosen, bound by the Intel plugin."""

OWN = {"attention_config": {"backend": "CPU_ATTN"}}


def on_torch(model: str, *modes: str, environment: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """An engine of ours on ``torch_native``."""
    return {
        "model": model, "modes": modes, "environment": environment or {}, "arguments": {**TORCH, **arguments},
    }  # fmt: skip


def ran(engine: Any, backend: str) -> None:
    """Our code attended, through this backend, in vLLM's memory."""
    assert engine.notes["kernels"]
    assert all(engine.notes["forwards"][name] > 0 for name in engine.notes["kernels"])
    assert engine.kernels() == {backend}
    assert engine.notes["shared"]


# Llama ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(engines: Callable[..., Any]) -> Any:
    # A budget of 25 tokens gives the third prompt a first chunk of one token. 19 blocks, one of them the null block,
    # are two short of what all requests need at their end.
    again = {"again": toys.prompts()[2:]}
    return engines({
        "own": {"model": "llama", "arguments": OWN},
        "vllm_cpu": {"model": "llama"},
        "chunked": {**on_torch("llama", max_num_batched_tokens=25, block_size=16), **again},
        "preempted": on_torch("llama", block_size=16, num_gpu_blocks_override=19),
        "head_dim 64": on_torch("llama64"),
        "head_dim 64, own": {"model": "llama64", "arguments": OWN},
        "LHBNC": on_torch("llama", environment={"VLLM_KV_CACHE_LAYOUT": "LHBNC"}),
        "fp8": on_torch("llama", kv_cache_dtype="fp8"),
        "fp8, vllm_cpu": {"model": "llama", "arguments": {"kv_cache_dtype": "fp8"}},
        "fp8, own": {"model": "llama", "arguments": {**OWN, "kv_cache_dtype": "fp8"}},
    })  # fmt: skip


def test_llama_is_transformers_and_vllm(llama: Any) -> None:
    exact = [name for name in llama if not name.startswith("fp8")]
    assert {name: llama[name].score() for name in exact} == dict.fromkeys(exact, toys.TOTAL)
    assert llama["own"].notes == llama["head_dim 64, own"].notes == {}
    for name in ("chunked", "preempted", "head_dim 64", "LHBNC"):
        ran(llama[name], "torch_native")


def test_chunks_mix_with_decoding_and_end_in_single_tokens(llama: Any) -> None:
    notes = llama["chunked"].notes
    assert notes["mixed"] > 5
    assert notes["late_singles"] > 0
    assert notes["steps"] > 2 * toys.NEW_TOKENS


def test_cached_prefixes_are_read(llama: Any) -> None:
    engine = llama["chunked"]
    assert engine.metrics["vllm:prefix_cache_hits"] >= 128
    assert engine.said["again"] == engine.model.want[2:]


def test_a_preempted_request_goes_on(llama: Any) -> None:
    assert llama["preempted"].metrics["vllm:num_preemptions"] > 0


def test_caches_of_8_bits(llama: Any) -> None:
    """Rounded to the nearest by us, towards zero by vLLM, which costs it twice as many of the exact tokens."""
    ran(llama["fp8"], "torch_native")
    ran(llama["fp8, vllm_cpu"], "vllm_cpu")
    assert llama["fp8, vllm_cpu"].said == llama["fp8, own"].said
    assert toys.TOTAL > llama["fp8"].score() > toys.TOTAL // 2


def test_vllms_kernels_are_the_choice_on_a_cpu(llama: Any) -> None:
    engine = llama["vllm_cpu"]
    ran(engine, "vllm_cpu")
    assert engine.notes["views"] == {"full": "VLLM_CPU"}
    assert engine.notes["layout"] == "LBHNC"
    assert engine.notes["page_size"] % 32 == 0


def test_the_decision_is_said_in_one_line(llama: Any) -> None:
    """Once per process and question: these differ by backend, head_dim and cache dtype."""
    said = [line.split("attn-core decided ")[1] for line in llama["own"].log.splitlines() if "attn-core dec" in line]
    assert len({line.split()[0] for line in said}) == len(said) == 5
    assert all("for LlamaForCausalLM on cpu:" in line for line in said)
    chosen = [line.split(": full: ")[1] for line in said]
    assert chosen == ["vllm_cpu", "torch_native", "torch_native", "torch_native", "vllm_cpu"]


# GPT-OSS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt_oss(engines: Callable[..., Any]) -> Any:
    per_kind = {"backend_per_kind": {"full_attention": "CPU_ATTN", "sliding_window": "CUSTOM"}}
    layouts = {
        name: on_torch("gpt_oss", environment={"VLLM_KV_CACHE_LAYOUT": name}) for name in LAYOUTS if name != "LHBNC"
    }
    return engines({
        "mixed": on_torch("gpt_oss", attention_config=per_kind),
        "own": {"model": "gpt_oss", "arguments": OWN},
        "vllm_cpu": {"model": "gpt_oss"},
        "ours": on_torch("gpt_oss", "sinks dropped", "window one short"),
        **layouts,
    })  # fmt: skip


def test_gpt_oss_is_transformers_and_vllm(gpt_oss: Any) -> None:
    assert {name: engine.score() for name, engine in gpt_oss.items()} == dict.fromkeys(gpt_oss, toys.TOTAL)
    ran(gpt_oss["ours"], "torch_native")
    ran(gpt_oss["vllm_cpu"], "vllm_cpu")
    assert set(gpt_oss["ours"].notes["forwards"]) == {"sliding", "full"}


def test_every_layout_is_read_in_place(gpt_oss: Any, llama: Any) -> None:
    for name in LAYOUTS:
        engine = llama[name] if name in llama else gpt_oss[name]
        assert engine.notes["layout"] == name
        ran(engine, "torch_native")


def test_vllm_may_run_a_kind_of_layers_itself(gpt_oss: Any) -> None:
    engine = gpt_oss["mixed"]
    ran(engine, "torch_native")
    assert set(engine.notes["forwards"]) == {"sliding"}
    assert engine.notes["layout"] == "LBHNC"  # what CPU_ATTN reads


def test_gpt_oss_notices(gpt_oss: Any) -> None:
    assert gpt_oss["ours"].score("sinks dropped") < toys.TOTAL // 2
    assert gpt_oss["ours"].score("window one short") < toys.TOTAL // 2


# Gemmas and DeepSeek -------------------------------------------------------------------------------------------------

NATIVE_ROPE = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
"""The CPU operator of vllm 0.32 rotates interleaved columns of a view wrongly, whichever backend attends."""


@pytest.fixture(scope="module")
def others(engines: Callable[..., Any]) -> Any:
    mla = {"again": toys.prompts()[2:]}
    own_mla = {"attention_config": {"backend": "CPU_MLA"}, **NATIVE_ROPE}
    return engines({
        "gemma2": on_torch("gemma2", "softcap dropped", "window one short"),
        "gemma2, vllm_cpu": {"model": "gemma2"},
        "gemma2, own": {"model": "gemma2", "arguments": OWN},
        "gemma3n": on_torch("gemma3n"),
        "gemma3n, own": {"model": "gemma3n", "arguments": OWN},
        "deepseek": {**on_torch("deepseek", max_num_batched_tokens=48, **NATIVE_ROPE), **mla},
        "deepseek, own": {"model": "deepseek", "arguments": own_mla},
    })  # fmt: skip


def test_gemmas_and_deepseek_are_transformers_and_vllm(others: Any) -> None:
    assert {name: engine.score() for name, engine in others.items()} == dict.fromkeys(others, toys.TOTAL)
    ran(others["gemma2"], "torch_native")
    ran(others["gemma2, vllm_cpu"], "vllm_cpu")
    ran(others["deepseek"], "torch_native")


def test_gemma2_notices(others: Any) -> None:
    assert others["gemma2"].score("softcap dropped") < toys.TOTAL // 2
    assert others["gemma2"].score("window one short") < toys.TOTAL // 2


def test_shared_caches_are_read_by_groups_of_their_own(others: Any) -> None:
    engine = others["gemma3n"]
    ran(engine, "torch_native")
    assert set(engine.notes["forwards"]) == {"sliding", "full", "sliding_shared", "full_shared"}
    assert "kv_write" not in engine.notes["kernels"]["sliding_shared"]


def test_mla_prompts_come_in_chunks_over_cached_context(others: Any) -> None:
    engine = others["deepseek"]
    assert engine.notes["mixed"] > 0
    assert engine.metrics["vllm:prefix_cache_hits"] >= 128
    assert engine.said["again"] == engine.model.want[2:]


def test_mla_prompts_may_be_absorbed(engines: Callable[..., Any]) -> None:
    runs = {"deepseek": {**on_torch("deepseek", max_num_batched_tokens=48, **NATIVE_ROPE), "again": toys.prompts()[2:]}}
    engine = engines(runs, VLLM_RUN_WITHOUT="materialised", VLLM_RUN_NO_AMX="1")["deepseek"]
    ran(engine, "torch_native")
    assert engine.score() == toys.TOTAL
    assert engine.notes["mixed"] > 0  # which vLLM's platform turns off for MLA on such a CPU
    assert engine.metrics["vllm:prefix_cache_hits"] >= 128
    assert engine.said["again"] == engine.model.want[2:]


# Encoders -------------------------------------------------------------------------------------------------------------


def test_an_encoder_is_transformers(engines: Callable[..., Any], model: Callable[[str], Any]) -> None:
    save_tokenizer(model("bert").folder)
    pooling = {"runner": "pooling", "pooler_config": {"task": "token_embed"}, "skip_tokenizer_init": False}
    engine = engines({"bert": on_torch("bert", **pooling)})["bert"]
    ran(engine, "torch_native")
    assert set(engine.notes["forwards"]) == {"encoder"}
    for got, want in zip(engine.said["right"], engine.model.want):
        for a, b in zip(got, want):
            assert a == pytest.approx(b, abs=2e-6)


def save_tokenizer(folder: Path) -> None:
    """Numbers as words: vLLM's pooling wants some tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(512)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0").save_pretrained(folder)


# Processes ------------------------------------------------------------------------------------------------------------


def test_engine_core_and_worker_in_their_own_processes(engines: Callable[..., Any]) -> None:
    """vLLM's default mode: the choice travels by pickle to the engine core and on to the worker."""
    custom = {"attention_config": {"backend": "CUSTOM"}}
    runs = {
        "ours": {"model": "gpt_oss", "arguments": custom, "modes": ["sinks dropped"]},
        "torch": on_torch("llama", **custom),
    }
    found = engines(runs, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    ran(found["ours"], "vllm_cpu")
    ran(found["torch"], "torch_native")
    assert {name: engine.score() for name, engine in found.items()} == dict.fromkeys(found, toys.TOTAL)
    assert found["ours"].score("sinks dropped") < toys.TOTAL // 2
