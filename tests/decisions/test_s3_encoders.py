"""S3: encoders and heads narrower than FlashInfer's kernels (sgl-project/sglang PR 6230, issue 6050)."""

from __future__ import annotations

import pytest
from asking import EVERYWHERE, ask

ENCODERS = ("gte-small", "modernbert-base")


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("model", ENCODERS)
def test_1_encoders_are_not_causal_and_write_no_cache(model, device):
    answer = ask(model, device)
    assert answer.status == 0
    for name, group in answer.data["model"]["groups"].items():
        assert group["attn_type"] == "encoder_only"
        assert set(answer.data["groups"][name]) - {"values"} == {"encode"}
        assert "kv_layout" not in answer.data["groups"][name]["values"]
    assert not {"page_size", "kv_cache_dtype"} & {k for k, v in answer.values.items() if v is not None}


@pytest.mark.parametrize(
    "device", ["cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_110", "cuda:sm_120", "cuda:sm_121"]
)
def test_2_flashinfer_pads_32_to_64_and_says_so(device):
    answer = ask("gte-small", device)
    choice = answer.data["groups"]["encoder"]["encode"]
    assert (choice["backend"], choice["head_dim"], choice["padded_from"]) == ("flashinfer", 64, 32)
    assert answer.data["groups"]["encoder"]["values"]["scale"] == pytest.approx(32**-0.5)
    assert any("padded" in text and "32" in text for text in answer.data["because"]["encoder.head_dim"])


@pytest.mark.parametrize(
    ("device", "backend"), [("cuda:sm_90", "fa3"), ("cuda:sm_100", "fa4"), ("cuda:sm_75", "triton")]
)
def test_2_native_widths_go_before_padded_ones(device, backend):
    choice = ask("gte-small", device).data["groups"]["encoder"]["encode"]
    assert (choice["backend"], choice["head_dim"], choice["padded_from"]) == (backend, 32, None)


@pytest.mark.parametrize("device", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_121"])
def test_2_naming_flashinfer_pads_too(device):
    choice = ask("gte-small", device, "--backend", "flashinfer").data["groups"]["encoder"]["encode"]
    assert (choice["backend"], choice["head_dim"], choice["padded_from"]) == ("flashinfer", 64, 32)
