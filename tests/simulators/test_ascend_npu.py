"""The stand-in for torch_npu does what torch_npu does: one test per quirk of its contract."""

from __future__ import annotations

import importlib

import pytest
import torch

from simulators import ascend_npu
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed

QUIRKS = Contract.load("torch_npu").quirks
ABOVE = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)


@pytest.fixture
def npu():
    with installed(ascend_npu.stand_in()):
        yield importlib.import_module("torch_npu")


def half(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ragged(**more):
    """Rows of 2 and 3 queries over 4 and 7 keys, in v1's words."""
    given = {
        "query": half(5, 4, 64), "key": half(11, 2, 64, seed=1), "value": half(11, 2, 64, seed=2),
        "actual_seq_lengths": [2, 5], "actual_seq_lengths_kv": [4, 11], "num_heads": 4, "num_key_value_heads": 2,
        "scale": 0.2, "input_layout": "TND", "sparse_mode": 3, "atten_mask": ABOVE,
    }  # fmt: skip
    return {**given, **more}


def paged(**more):
    given = ragged(
        key=half(4, 128, 128, seed=1), value=half(4, 128, 128, seed=2), actual_seq_lengths_kv=[4, 130], block_size=128,
        block_table=torch.tensor([[1, 0], [3, 2]], dtype=torch.int32),
    )  # fmt: skip
    return {**given, **more}


def in_v2(**more):
    names = {"actual_seq_lengths": "actual_seq_qlen", "actual_seq_lengths_kv": "actual_seq_kvlen",
             "num_heads": "num_query_heads", "scale": "softmax_scale"}  # fmt: skip
    return {**{names.get(k, k): v for k, v in ragged().items()}, **more}


def latent(**more):
    rows = half(4, 128, 512, seed=1)
    return in_v2(
        query=half(5, 4, 512), key=rows, value=rows, query_rope=half(5, 4, 64), key_rope=half(4, 128, 64, seed=3),
        num_key_value_heads=1, actual_seq_kvlen=[4, 130], block_size=128,
        block_table=torch.tensor([[1, 0], [3, 2]], dtype=torch.int32), **more,
    )  # fmt: skip


def test_every_quirk_has_a_test():
    """Here, or in the tests of the other parts of the stand-in."""
    from simulators import test_ascend_atb, test_ascend_graphs

    names = {n for part in (globals(), vars(test_ascend_atb), vars(test_ascend_graphs)) for n in part}
    assert {f"test_quirk_{name}" for name in QUIRKS} == {n for n in names if n.startswith("test_quirk_")}


def test_quirk_scale_defaults_to_one(npu):
    given = ragged()
    del given["scale"]
    plain, _ = npu.npu_fused_infer_attention_score(**given)
    assert torch.equal(plain, npu.npu_fused_infer_attention_score(**ragged(scale=1.0))[0])
    assert not torch.equal(plain, npu.npu_fused_infer_attention_score(**ragged(scale=64**-0.5))[0])


def test_quirk_heads_default_to_one(npu):
    given = ragged()
    del given["num_heads"]
    with pytest.raises(Refused, match="number of heads is 1, q has 4"):
        npu.npu_fused_infer_attention_score(**given)
    with pytest.raises((Refused, RuntimeError)):
        npu.npu_fused_infer_attention_score(**paged(num_key_value_heads=0))


def test_quirk_two_values_always(npu):
    out, lse = npu.npu_fused_infer_attention_score(**ragged())
    assert out.shape == (5, 4, 64)
    assert lse.shape == (1,)


def test_quirk_lse_has_a_last_one(npu):
    _, lse = npu.npu_fused_infer_attention_score(**ragged(softmax_lse_flag=True))
    assert (lse.shape, lse.dtype) == ((5, 4, 1), torch.float32)


def test_quirk_query_lens_are_cumulative(npu):
    for wrong in ([2, 3], [0, 2, 5]):
        with pytest.raises((Misuse, Refused)):
            npu.npu_fused_infer_attention_score(**ragged(actual_seq_lengths=wrong))


def test_quirk_paged_key_lens_are_plain(npu):
    npu.npu_fused_infer_attention_score(**paged())
    with pytest.raises(Misuse, match="outside its pages"):
        npu.npu_fused_infer_attention_score(**paged(actual_seq_lengths_kv=[4, 300]))
    with pytest.raises(Misuse, match="cumulative"):
        npu.npu_fused_infer_attention_score(**ragged(actual_seq_lengths_kv=[4, 7]))


def test_quirk_lengths_are_host_lists(npu):
    with pytest.raises(Misuse, match="waits"):
        npu.npu_fused_infer_attention_score(**ragged(actual_seq_lengths=torch.tensor([2, 5])))


def test_quirk_names_differ_by_version(npu):
    v1, v2 = npu.npu_fused_infer_attention_score, npu.npu_fused_infer_attention_score_v2
    for function, given in ((v1, in_v2()), (v2, ragged())):
        with pytest.raises(RuntimeError, match="unexpected keyword"):
            function(**given)
    assert torch.equal(v1(**ragged())[0], v2(**in_v2())[0])


def test_quirk_sinks_in_v2_only(npu):
    sinks = half(4, seed=5)
    plain, _ = npu.npu_fused_infer_attention_score_v2(**in_v2())
    assert not torch.equal(npu.npu_fused_infer_attention_score_v2(**in_v2(learnable_sink=sinks))[0], plain)
    with pytest.raises(RuntimeError, match="learnable_sink"):
        npu.npu_fused_infer_attention_score(**ragged(learnable_sink=sinks))


def test_quirk_mask_of_mode_zero_is_literal(npu):
    everything, _ = npu.npu_fused_infer_attention_score(**ragged(sparse_mode=0, atten_mask=None))
    assert not torch.equal(everything, npu.npu_fused_infer_attention_score(**ragged())[0])
    with pytest.raises(NotImplementedError):
        npu.npu_fused_infer_attention_score(**ragged(sparse_mode=0))


def test_quirk_pre_tokens_counts_before(npu):
    """With one key before its own, the last query of row 0 sees keys 2 and 3 and no others."""
    given = ragged(sparse_mode=4, pre_tokens=1, next_tokens=0)
    out, _ = npu.npu_fused_infer_attention_score(**given)
    key, value = given["key"].clone(), given["value"].clone()
    key[:2], value[:2] = 9.0, 9.0
    again, _ = npu.npu_fused_infer_attention_score(**{**given, "key": key, "value": value})
    assert torch.equal(again[1], out[1])
    key[2], value[2] = 9.0, 9.0
    assert not torch.equal(npu.npu_fused_infer_attention_score(**{**given, "key": key, "value": value})[0][1], out[1])


def test_quirk_window_needs_mode_four(npu):
    out, _ = npu.npu_fused_infer_attention_score(**ragged(pre_tokens=1, next_tokens=0))
    assert torch.equal(out, npu.npu_fused_infer_attention_score(**ragged())[0])


def test_quirk_inputs_are_read_as_packed(npu):
    with pytest.raises(Misuse, match="contiguous"):
        npu.npu_fused_infer_attention_score(**ragged(query=half(4, 5, 64).transpose(0, 1)))


def test_quirk_latent_has_no_lse(npu):
    assert npu.npu_fused_infer_attention_score_v2(**latent())[0].shape == (5, 4, 512)
    with pytest.raises(Refused, match="LSE"):
        npu.npu_fused_infer_attention_score_v2(**latent(return_softmax_lse=True))


def test_quirk_scatter_defaults_to_nz(npu):
    cache = torch.zeros(2, 128, 2, 64).bfloat16()
    given = (half(1, 2, 64), half(1, 2, 64), cache, cache.clone(), torch.tensor([130], dtype=torch.int32))
    with pytest.raises(Misuse, match="fractal"):
        npu.npu_scatter_pa_kv_cache(*given)
    npu.npu_scatter_pa_kv_cache(*given, cache_mode="Norm")
    assert torch.equal(cache[1, 2], given[0][0])
