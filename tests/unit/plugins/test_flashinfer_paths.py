"""Which of FlashInfer's kernels serves where: named in every decision, and sinks only for who asks for them."""

from __future__ import annotations

from typing import Any

import pytest
from vendors import chosen, decide, device, rows

from attn_core import NoBackendError

CUDA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
ENCODER = {"attn_type": "encoder_only", "num_heads": 16, "num_kv_heads": 16, "head_dim": 128, "dtype": "bfloat16"}
DENSE = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}


def kernels(model: Any, where: str, **options: Any) -> dict[str, tuple[str, ...]]:
    """Role -> FlashInfer's kernels in the decision, of one group."""
    (group,) = decide(model, where, backend="flashinfer", **options).groups.values()
    return {role: tuple(c.variants) for role, c in group.choices.items() if c.backend == "flashinfer"}


@pytest.mark.parametrize(
    ("arch", "spec", "found"),
    [
        ("sm_80", {}, ("fa2",)),
        ("sm_90", {}, ("fa3",)),
        ("sm_100", {}, ("cudnn",)),
        ("sm_103", {}, ("cudnn",)),
        ("sm_110", {}, ("cutlass", "fa2")),
        ("sm_120", {}, ("fa2",)),
        ("sm_121", {}, ("fa2",)),
        # grouped heads: cuDNN's LSE of single tokens is wrong, so that it does not claim them
        ("sm_100", {"num_kv_heads": 4}, ("cutlass", "fa2")),
        # FlashInfer leaves these widths to fa2, and nothing is padded to reach another kernel
        ("sm_100", {"head_dim": 64}, ("fa2",)),
        ("sm_100", {"head_dim": 96}, ("fa2",)),
        ("sm_110", {"head_dim": 32}, ("fa2",)),
        ("sm_100", {"head_dim": 256}, ("cudnn",)),
        ("sm_110", {"head_dim": 256}, ("fa2",)),
        # what these kernels lack
        ("sm_100", {"logit_softcap": 30.0}, ("fa2",)),
    ],
)
def test_encoders(arch: str, spec: dict[str, Any], found: tuple[str, ...]) -> None:
    assert kernels({**ENCODER, **spec}, f"cuda:{arch}") == {"encode": found}


@pytest.mark.parametrize("missing", ["nvidia-cudnn-frontend", "nvidia-cudnn-cu13"])
def test_without_cudnn_the_next_one_serves(missing: str) -> None:
    assert kernels(ENCODER, "cuda:sm_100", without=(missing,)) == {"encode": ("cutlass", "fa2")}
    assert kernels("deepseek-v3", "cuda:sm_100", without=(missing,))["prefill"] == ("cutlass", "fa2")


@pytest.mark.parametrize(
    ("arch", "prefill"), [("sm_100", ("cudnn",)), ("sm_110", ("cutlass", "fa2")), ("sm_121", ("fa2",))]
)
def test_materialised_prefill(arch: str, prefill: tuple[str, ...]) -> None:
    assert kernels("deepseek-v3", f"cuda:{arch}") == {"prefill": prefill, "decode": ("fa2",)}


def test_bounds_of_lengths_go_to_kernels_without_a_plan() -> None:
    """fa2 and fa3 read lengths on the host."""
    bounds = {"host_lengths": "bounds"}
    for arch in ("sm_100", "sm_103"):
        assert kernels(DENSE, f"cuda:{arch}", **bounds) == {"prefill": ("cudnn",), "decode": ("cudnn",)}
        assert kernels(DENSE, f"cuda:{arch}") == {"prefill": ("fa2",), "decode": ("fa2",)}
    for arch in ("sm_90", "sm_120", "sm_121"):
        assert kernels(ENCODER, f"cuda:{arch}", **bounds) == {"encode": ("fmha_v2",)}
        with pytest.raises(NoBackendError):
            decide({**ENCODER, "dtype": "float16"}, f"cuda:{arch}", backend="flashinfer", **bounds)


def test_verify_rows_of_cudnn_need_what_its_decode_kernel_is_written_in() -> None:
    asked = {"host_lengths": "bounds", "verify_width": 3}
    assert kernels(DENSE, "cuda:sm_100", **asked)["decode"] == ("cudnn",)
    for width in ({**asked, "verify_width": 5}, {**asked, "versions": {"nvidia-cutlass-dsl": "4.6.2"}}):
        with pytest.raises(NoBackendError):
            decide(DENSE, "cuda:sm_100", backend="flashinfer", **width)


def test_lse_of_grouped_heads_is_not_asked_of_cudnns_prefill() -> None:
    with pytest.raises(NoBackendError, match="group_size"):
        decide(DENSE, "cuda:sm_100", backend="flashinfer", host_lengths="bounds", lse=True)
    alone = {**DENSE, "num_kv_heads": 32}
    assert kernels(alone, "cuda:sm_100", host_lengths="bounds", lse=True)["prefill"] == ("cudnn",)


@pytest.mark.parametrize("arch", CUDA)
def test_no_path_is_left_to_flashinfer(arch: str) -> None:
    for row in rows("cuda", device(f"cuda:{arch}")):
        if row.backend.startswith("flashinfer") and row.role != "allreduce_fusion":
            assert row.variants, row
            assert "auto" not in row.variants, row


# Sinks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", CUDA)
def test_sinks_are_for_who_names_them(arch: str) -> None:
    decision = decide("gpt-oss-20b", f"cuda:{arch}", backend="flashinfer_sinks")
    prefill = "fa3" if arch == "sm_90" else "fa2"
    decode = "xqa" if arch in ("sm_120", "sm_121") else "fa2"
    for group in ("full", "sliding"):
        assert chosen(decision, group) == ("flashinfer_sinks", "flashinfer_sinks")
        choices = decision.groups[group].choices
        assert [tuple(choices[r].variants) for r in ("prefill", "decode")] == [(prefill,), (decode,)]
    for options in ({}, {"page_size": 1}, {"verify_width": 2}):
        default = decide("gpt-oss-20b", f"cuda:{arch}", **options)
        assert "flashinfer_sinks" not in {*chosen(default, "full"), *chosen(default, "sliding")}


@pytest.mark.parametrize("arch", CUDA)
def test_the_plain_name_stays_refused_with_the_alternatives(arch: str) -> None:
    with pytest.raises(NoBackendError) as e:
        decide("gpt-oss-20b", f"cuda:{arch}", backend="flashinfer")
    reasons = {(r.backend, r.role, r.field, r.got) for r in e.value.rejections}
    for role in ("prefill", "decode"):
        assert ("flashinfer", role, "sinks", True) in reasons
        pinned = [r for r in e.value.rejections if r.backend == "flashinfer_sinks" and r.role == role]
        assert pinned
        assert any(r.code == "pin" for r in pinned)
    assert "flashinfer_sinks (cuda)" in e.value.text
    assert "without backend=flashinfer" in e.value.text


def test_groups_without_sinks_are_not_for_them() -> None:
    with pytest.raises(NoBackendError, match="sinks"):
        decide("llama-3.1-8b", "cuda:sm_90", backend="flashinfer_sinks")
    with pytest.raises(NoBackendError):
        decide("gpt-oss-20b", "cuda:sm_75", backend="flashinfer_sinks")
