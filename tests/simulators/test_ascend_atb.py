"""The stand-in's ATB kernels do what torch_npu's do on 310P: one test per quirk that has to do with them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from simulators import ascend_npu
from simulators.contract import Misuse, Refused
from simulators.standin import installed

MASK = torch.full((2048, 2048), -10000.0, dtype=torch.float16).triu_(1)


@pytest.fixture
def npu():
    with installed(ascend_npu.stand_in()):
        yield importlib.import_module("torch_npu")


def cache(npu: Any, seed: int = 0, acl_format: int = 29) -> torch.Tensor:
    """Four pages of two kv heads of width 32."""
    made = npu.empty_with_format([4, 4, 128, 16], dtype=torch.float16, device="cpu", acl_format=acl_format)
    return made.copy_(torch.randn(4, 4, 128, 16, generator=torch.Generator().manual_seed(seed)))


def given(npu: Any, queries: int = 2, **more: Any) -> dict[str, Any]:
    q = torch.randn(queries, 4, 32, generator=torch.Generator().manual_seed(3)).half()
    return {
        "query": q, "key_cache": cache(npu, 1), "value_cache": cache(npu, 2), "num_kv_heads": 2, "num_heads": 4,
        "scale_value": 0.2, "block_table": torch.tensor([[1, 0], [3, 2]], dtype=torch.int32),
        "context_lens": torch.tensor([3, 130], dtype=torch.int32), "out": torch.empty_like(q), **more,
    }  # fmt: skip


def split(npu: Any, **more: Any) -> dict[str, Any]:
    """Rows of 2 and 3 queries."""
    return given(npu, 5, **{"mask": MASK, "seq_len": torch.tensor([2, 3], dtype=torch.int32), **more})


def test_quirk_nz_is_a_tag(npu):
    k = torch.randn(1, 2, 32).half()
    slot = torch.tensor([130], dtype=torch.int32)
    for formats in ((2, 2), (29, 2)):
        with pytest.raises(Misuse, match="plain ones"):
            npu._npu_reshape_and_cache(k, k, *(cache(npu, acl_format=f) for f in formats), slot)
    keys, values = cache(npu), cache(npu, 1)
    assert npu.get_npu_format(keys) == 29
    npu._npu_reshape_and_cache(k, 2 * k, keys, values, slot)
    assert torch.equal(keys[1, :, 2].flatten(), k.flatten())
    assert torch.equal(values[1, :, 2].flatten(), 2 * k.flatten())


def test_quirk_atb_mask_is_added(npu):
    call = split(npu)
    npu._npu_paged_attention_splitfuse_v2(**call)
    last = given(npu, query=call["query"][[1, 4]])
    npu._npu_paged_attention(**last)
    assert torch.equal(call["out"][[1, 4]], last["out"]), "the last query of a row sees all its keys"
    for wrong in (MASK.bool().half(), MASK.T.contiguous(), torch.full_like(MASK, -10000.0).triu_(0)):
        with pytest.raises(Misuse, match="added"):
            npu._npu_paged_attention_splitfuse_v2(**split(npu, mask=wrong))
    for wrong in ({"mask": MASK[:128, :128]}, {"mask": MASK.float()}, {"mask_type": 3}):
        with pytest.raises(Refused):
            npu._npu_paged_attention_splitfuse_v2(**split(npu, **wrong))


def test_quirk_atb_query_lens_on_the_host(npu):
    for wrong in ([3, 130], [2, 5], [4, 1]):
        with pytest.raises(Misuse, match="queries"):
            npu._npu_paged_attention_splitfuse_v2(**split(npu, seq_len=torch.tensor(wrong, dtype=torch.int32)))
    with pytest.raises(Misuse, match="host"):
        npu._npu_paged_attention_splitfuse_v2(**split(npu, seq_len=torch.tensor([2, 3], device="meta").int()))
    with pytest.raises(Misuse, match="read it there"):
        npu._npu_paged_attention(**given(npu, context_lens=torch.tensor([3, 130], device="meta").int()))


def test_quirk_atb_writes_into_out(npu):
    call = given(npu)
    assert npu._npu_paged_attention(**call) is None
    assert call["out"].isfinite().all()
    with pytest.raises(Misuse, match="packed"):
        npu._npu_paged_attention(**given(npu, out=torch.empty(4, 2, 32).half().transpose(0, 1)))


def test_quirk_atb_names_exist_without_nnal():
    with installed(ascend_npu.stand_in(nnal=False)):
        npu, ops = (importlib.import_module(n) for n in ("torch_npu", "torch_npu.op_plugin.atb._atb_ops"))
        assert npu._npu_paged_attention
        for call in (lambda: npu._npu_paged_attention(**given(npu)), ops._register_atb_extensions):
            with pytest.raises(OSError, match="nnal"):
                call()


@pytest.mark.parametrize(
    "wrong",
    [{"query": torch.zeros(2, 4, 32)}, {"num_heads": 2}, {"num_kv_heads": 3},
     {"block_table": torch.zeros(1, 2).int()}, {"context_lens": torch.tensor([3, 300]).int()},
     {"key_cache": torch.zeros(4, 128, 2, 32).half()}, {"block_table": torch.zeros(2, 2).long()}],
    ids=lambda w: str(list(w)),
)  # fmt: skip
def test_what_is_refused(npu, wrong):
    with pytest.raises((Refused, Misuse)):
        npu._npu_paged_attention(**given(npu, **wrong))
