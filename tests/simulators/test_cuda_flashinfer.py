"""The stand-in of FlashInfer: one test per quirk."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from simulators import cuda_flashinfer, cuda_flashinfer_common, test_cuda_allreduce, test_cuda_flashinfer_kernels
from simulators.contract import Contract, Misuse, Refused
from simulators.standin import installed


@pytest.fixture
def fi(monkeypatch):
    monkeypatch.setattr(cuda_flashinfer_common, "WORKSPACE_BYTES", 1 << 10)
    with installed(cuda_flashinfer.stand_in()):
        yield {n: importlib.import_module(f"flashinfer.{n}") for n in ("prefill", "decode", "mla")}


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


SPACE = torch.zeros(1 << 10, dtype=torch.uint8)
PAGES = (ints(0, 2, 3), ints(0, 2, 3), ints(3, 1, 2), ints(1, 4))  # 2 + 1 queries, 5 and 4 keys in pages of 4
TWO = {"q": random(3, 4, 64), "paged_kv_cache": (random(4, 4, 2, 64), random(4, 4, 2, 64))}


def wrapper(fi, *, kv_layout="NHD", backend="fa2", init=None, **plan):
    made = fi["prefill"].BatchPrefillWithPagedKVCacheWrapper(SPACE, kv_layout, backend=backend, **(init or {}))
    made.plan(*PAGES, 4, 2, 64, 4, **{"causal": True, "q_data_type": torch.bfloat16, **plan})
    return made


def planless(**more):
    """Two rows, one query each."""
    return {
        "query": random(2, 4, 64), "kv_cache": (random(4, 2, 16, 64), random(4, 2, 16, 64)), "workspace_buffer": SPACE,
        "block_tables": ints(1, 2)[:, None], "seq_lens": ints(5, 9), "max_seq_len": 9, "backend": "trtllm-gen",
        "multi_ctas_kv_counter_buffer": torch.zeros(2048, dtype=torch.uint8), **more,
    }  # fmt: skip


def latent(fi, **plan):
    made = fi["mla"].BatchMLAPagedAttentionWrapper(SPACE, backend="fa2")
    given = {
        "num_heads": 4, "head_dim_ckv": 512, "head_dim_kpe": 64, "page_size": 4, "causal": True, "sm_scale": 0.1,
        "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, **plan,
    }  # fmt: skip
    made.plan(metadata=fi["mla"].MLAPlanMetadata.csr(*PAGES[:3], ints(5, 4)), **given)
    return made, {"query": random(3, 4, 576), "kv_cache": random(4, 4, 576).to(given["kv_data_type"])}


def test_every_quirk_has_a_test():
    names = [*globals(), *vars(test_cuda_flashinfer_kernels), *vars(test_cuda_allreduce)]
    tested = {n[11:] for n in names if n.startswith("test_quirk_")}
    assert tested == set(Contract.load("flashinfer").quirks)


def test_quirk_sinks_dropped(fi):
    w = wrapper(fi)
    assert torch.equal(w.run(**TWO), w.run(**TWO, sinks=torch.full((4,), 9.0)))


def test_quirk_lse_base_2(fi):
    _, lse = wrapper(fi).run(**TWO, return_lse=True)
    assert (lse.shape, lse.dtype) == ((3, 4), torch.float32)
    k = torch.cat([TWO["paged_kv_cache"][0][3], TWO["paged_kv_cache"][0][1]])[:5].float()
    natural = torch.logsumexp(k[:, 0] @ TWO["q"][1, 0].float() / 8, 0)
    assert float(lse[1, 0]) == pytest.approx(float(natural) / math.log(2), abs=1e-4)


def test_quirk_default_q_dtype_is_float16(fi):
    with pytest.raises(Refused, match="float16"):
        wrapper(fi, q_data_type="float16").run(**TWO)


def test_quirk_causal_defaults_to_false(fi):
    assert not torch.equal(wrapper(fi).run(**TWO), wrapper(fi, causal=False).run(**TWO))
    functions = Contract.load("flashinfer").functions
    expected = {"BatchPrefillWithPagedKVCacheWrapper.plan": False, "trtllm_batch_context_with_kv_cache": True}
    for name, default in expected.items():
        assert functions[f"flashinfer.prefill.{name}"].signature.parameters["causal"].default is default


def test_quirk_custom_mask_replaces_causality(fi):
    everything = torch.ones(2 * 5 + 4, dtype=torch.bool)
    open_ = wrapper(fi, causal=False).run(**TWO)
    assert torch.equal(wrapper(fi, custom_mask=everything).run(**TWO), open_)
    assert not torch.equal(wrapper(fi, custom_mask=everything, window_left=1).run(**TWO), open_)
    with pytest.raises(Misuse, match="mask"):
        wrapper(fi, custom_mask=everything[:-1])


def test_quirk_window_is_planned(fi):
    w = wrapper(fi, window_left=2)
    w.run(**TWO, window_left=2)
    with pytest.raises(AssertionError):
        w.run(**TWO, window_left=3)


def test_quirk_graph_mode_copies_into_buffers(fi):
    buffers = {
        "use_cuda_graph": True, "qo_indptr_buf": torch.zeros(3).int(), "paged_kv_indptr_buf": torch.zeros(3).int(),
        "paged_kv_indices_buf": torch.zeros(3).int(), "paged_kv_last_page_len_buf": torch.zeros(2).int(),
    }  # fmt: skip
    w = wrapper(fi, init=buffers)
    assert buffers["paged_kv_indices_buf"].tolist() == [3, 1, 2]
    given = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 64, "page_size": 4, "q_data_type": torch.bfloat16}
    with pytest.raises(Refused, match="batch size"):
        w.plan(ints(0, 1), ints(0, 1), ints(1), ints(4), **given)
    with pytest.raises(Refused, match="more pages"):
        w.plan(ints(0, 2, 3), ints(0, 3, 4), ints(1, 2, 3, 1), ints(1, 4), **given)
    masks = {"custom_mask_buf": torch.zeros(9, dtype=torch.uint8), "mask_indptr_buf": torch.zeros(3).int()}
    with pytest.raises(Misuse, match="mask"):
        wrapper(fi, init={**buffers, **masks})


def test_quirk_v_scale_rounds_twice(fi):
    w = wrapper(fi)
    plain = w.run(**TWO)
    assert torch.equal(w.run(**TWO, v_scale=1.0), plain)
    assert torch.equal(w.run(**TWO, v_scale=0.3), plain * 0.3)


def test_quirk_mla_lse_is_planned(fi):
    w, given = latent(fi, lse_mode="basee")
    out, lse = w.run(**given, return_lse=True, return_lse_base_on_e=True)
    assert (out.shape, lse.shape) == ((3, 4, 512), (3, 4))
    for asked in ({}, {"return_lse": True}):
        with pytest.raises(Refused, match="LSE"):
            w.run(**given, **asked)


def test_quirk_mla_fp8_needs_scales(fi):
    w, given = latent(fi, kv_data_type=torch.float8_e4m3fn, scale_mode="kv-per-tensor")
    w.run(**given, ckv_scale=0.5, kpe_scale=0.5)
    with pytest.raises(Refused, match="ckv_scale"):
        w.run(**given)
    w, given = latent(fi)
    with pytest.raises(Refused, match="ckv_scale"):
        w.run(**given, ckv_scale=0.5, kpe_scale=0.5)


def test_quirk_scales_default_to_one(fi):
    run = fi["decode"].trtllm_batch_decode_with_kv_cache
    assert torch.equal(run(**planless()), run(**planless(), bmm1_scale=1.0, bmm2_scale=1.0))
    assert not torch.equal(run(**planless()), run(**planless(), bmm1_scale=64**-0.5))


def test_quirk_default_layout_differs():
    functions = Contract.load("flashinfer").functions
    layouts = {
        n.rpartition(".")[2]: f.signature.parameters["kv_layout"].default
        for n, f in functions.items()
        if "kv_layout" in f.signature.parameters
    }
    assert layouts == {
        "BatchPrefillWithPagedKVCacheWrapper": "NHD", "BatchPrefillWithRaggedKVCacheWrapper": "NHD",
        "trtllm_batch_decode_with_kv_cache": "HND", "xqa_batch_decode_with_kv_cache": "NHD",
        "trtllm_batch_context_with_kv_cache": "HND", "BatchAttentionWithAttentionSinkWrapper": "NHD",
    }  # fmt: skip


def test_quirk_workspace_must_be_zero(fi):
    with pytest.raises(Misuse, match="zeroed"):
        fi["decode"].trtllm_batch_decode_with_kv_cache(**planless(workspace_buffer=SPACE + 1))


def test_quirk_counter_is_allocated_per_call(fi):
    with pytest.raises(Misuse, match="counter"):
        fi["decode"].trtllm_batch_decode_with_kv_cache(**planless(multi_ctas_kv_counter_buffer=None))


def test_quirk_xqa_has_no_lse(fi):
    given = planless()
    del given["backend"], given["multi_ctas_kv_counter_buffer"]
    assert fi["decode"].xqa_batch_decode_with_kv_cache(**given, kv_layout="HND").shape == (2, 4, 64)
    with pytest.raises(TypeError, match="return_lse"):
        fi["decode"].xqa_batch_decode_with_kv_cache(**given, return_lse=True)


def test_quirk_xqa_reads_q_by_shape(fi):
    given = planless()
    del given["backend"], given["multi_ctas_kv_counter_buffer"]
    q, run = given.pop("query"), fi["decode"].xqa_batch_decode_with_kv_cache
    fused = torch.cat((q, q), 1)[:, : q.shape[1]]
    with pytest.raises(Misuse, match="strides of query"):
        run(fused, **given, kv_layout="HND")
    with pytest.raises(Misuse, match="strides of out"):
        run(q, **given, kv_layout="HND", out=torch.empty_like(torch.cat((q, q), 1))[:, : q.shape[1]])
    with pytest.raises(Misuse, match="strides of out"):
        fi["decode"].trtllm_batch_decode_with_kv_cache(**planless(out=torch.cat((q, q), 1)[:, : q.shape[1]]))


def test_quirk_trtllm_sinks_float32(fi):
    run = fi["decode"].trtllm_batch_decode_with_kv_cache
    assert not torch.equal(run(**planless(sinks=torch.ones(4))), run(**planless()))
    with pytest.raises(Refused, match="sinks"):
        run(**planless(sinks=torch.ones(4).bfloat16()))


def test_quirk_empty_rows_are_not_skipped(fi):
    given = {
        "query": random(2, 4, 128), "key": random(3, 4, 128), "value": random(3, 4, 128), "workspace_buffer": SPACE,
        "seq_lens": ints(3, 0), "max_q_len": 1, "max_kv_len": 3, "bmm1_scale": 0.1, "bmm2_scale": 1.0, "o_sf_scale": 1,
        "batch_size": 2, "window_left": -1, "cum_seq_lens_q": ints(0, 1, 2), "cum_seq_lens_kv": ints(0, 3, 3),
        "enable_pdl": None, "is_causal": False, "return_lse": True,
    }  # fmt: skip
    run = fi["prefill"].trtllm_ragged_attention_deepseek
    with pytest.raises(Misuse, match="without keys"):
        run(**given)
    out, lse = run(**given, q_seq_lens_cpu=ints(1, 1), kv_seq_lens_cpu=ints(3, 0))
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()


def test_quirk_mla_batched_query(fi):
    run = fi["mla"].trtllm_batch_decode_with_kv_cache_mla
    given = planless(query=random(2, 1, 4, 576), kv_cache=random(4, 32, 576))
    given.update(qk_nope_head_dim=128, kv_lora_rank=512, qk_rope_head_dim=64, return_lse=True)
    given["block_tables"] = torch.cat([given["block_tables"]] * 4, 1)
    out, base2 = run(**given)
    given["backend"] = "cute-dsl"
    same, natural = run(**given, cute_dsl_impl="monolithic")
    assert torch.equal(out, same)
    assert (out.shape, base2.shape, natural.shape) == ((2, 1, 4, 512), (2, 4), (2, 1, 4))
    assert torch.allclose(base2 * math.log(2), natural[:, 0], atol=1e-5)
    with pytest.raises(Refused, match="queries"):
        run(**{**given, "query": given["query"][:, 0]}, cute_dsl_impl="monolithic")
