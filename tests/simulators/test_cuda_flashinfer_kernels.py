"""The stand-in of FlashInfer's CUTLASS, cuDNN and fmha_v2 kernels and of those with sinks: a test per quirk."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from simulators import cuda_flashinfer, cuda_flashinfer_common, cuda_flashinfer_variants
from simulators.contract import Misuse, Refused
from simulators.standin import installed

BF16 = {"q_data_type": torch.bfloat16}
SPACE = torch.zeros(1 << 10, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cuda_flashinfer_common, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(cuda_flashinfer_variants, "LOADED", {})


def module(name, arch="sm_90"):
    with installed(cuda_flashinfer.stand_in(arch)):
        return importlib.import_module(f"flashinfer.{name}")


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def ragged(backend, *, offsets=(0, 2, 5), heads=4, kv_heads=4, **plan):
    made = module("prefill").BatchPrefillWithRaggedKVCacheWrapper(SPACE, "NHD", backend=backend)
    made.plan(ints(*offsets), ints(*offsets), heads, kv_heads, 128, **{**BF16, **plan})
    return made


ROWS = {name: random(5, 4, 128) for name in "qkv"}


def test_cutlass_computes():
    assert torch.equal(ragged("cutlass").run(**ROWS), ragged("fa2").run(**ROWS))
    with pytest.raises(Refused, match="head_dims"):
        module("prefill").BatchPrefillWithRaggedKVCacheWrapper(SPACE, backend="cutlass").plan(
            ints(0, 2), ints(0, 2), 4, 4, 256, **BF16
        )


def test_quirk_cutlass_drops_what_it_lacks():
    for more in ({"window_left": 3}, {"logits_soft_cap": 2.0}):
        with pytest.raises(Misuse, match="drops"):
            ragged("cutlass", **more)


def test_quirk_cutlass_plan_overruns():
    ragged("cutlass", heads=43690, kv_heads=2, offsets=(0, 256, 257, 258))  # 131070 tiles
    with pytest.raises(Misuse, match="overrun"):
        ragged("cutlass", heads=43690, kv_heads=2, offsets=(0, 257, 258, 259))


def test_quirk_out_is_written_by_shape():
    out = torch.zeros(5, 4, 256, dtype=torch.bfloat16)[..., :128]
    for backend in ("fa2", "cutlass"):
        with pytest.raises(Misuse, match="strides of out"):
            ragged(backend).run(**ROWS, out=out)
    assert ragged("fa3").run(**ROWS, out=out) is out
    with pytest.raises(Refused, match="contiguous"):
        ragged("cudnn").run(**ROWS, out=out)


def test_rows_without_keys_are_cutlass_but_not_cudnns_business():
    given = {"q": ROWS["q"][:3], "k": ROWS["k"][:2], "v": ROWS["v"][:2], "return_lse": True}
    for backend, expected in (("cutlass", -math.inf), ("cudnn", math.nan)):
        made = module("prefill").BatchPrefillWithRaggedKVCacheWrapper(SPACE, "NHD", backend=backend)
        made.plan(ints(0, 2, 3), ints(0, 2, 2), 4, 4, 128, **BF16)
        _, lse = made.run(**given)
        assert torch.equal(lse[2], torch.full((4,), expected)) or (math.isnan(expected) and lse[2].isnan().all())


def test_cudnn_refuses_what_it_lacks():
    for more in ({"window_left": 3}, {"logits_soft_cap": 2.0}):
        with pytest.raises(Refused, match="cudnn takes no"):
            ragged("cudnn", **more)


def pages(**more):
    """Three rows of 1, 1 and 1 queries under grouped heads, over caches of (pages, heads, page, width)."""
    return {
        "q": random(3, 4, 128), "k_cache": random(6, 2, 16, 128), "v_cache": random(6, 2, 16, 128), "scale": 0.1,
        "workspace_buffer": SPACE, "max_sequence_kv": 32, "actual_seq_lens_kv": ints(5, 20, 9).view(3, 1, 1, 1),
        "block_tables": ints(1, 0, 2, 3, 4, 0).view(3, 2), **more,
    }  # fmt: skip


def prefill(**more):
    return {
        **pages(), "max_token_per_sequence": 16, "causal": True, "return_lse": True,
        "batch_offsets_q": ints(0, 1, 2, 3),
        "batch_offsets_units": "tokens", "batch_offsets_stats": ints(0, 1, 2, 3), "lse": torch.zeros(3, 4), **more,
    }  # fmt: skip


def test_quirk_cudnn_single_token_lse():
    run = module("cudnn").cudnn_batch_prefill_with_kv_cache
    out, lse = run(**prefill())
    assert lse.isfinite().all()
    same, lse = run(**prefill(max_token_per_sequence=1))
    assert torch.equal(out, same)
    assert lse.isfinite()[:, [0, 2]].all()
    assert lse.isnan()[:, [1, 3]].all()
    made = ragged("cudnn", offsets=(0, 1, 2), kv_heads=2)
    with pytest.raises(Refused, match="first head"):
        made.run(random(2, 4, 128), random(2, 2, 128), random(2, 2, 128), return_lse=True)


def test_quirk_cudnn_offsets_are_elements():
    with pytest.raises(Misuse, match="elements"):
        module("cudnn").cudnn_batch_prefill_with_kv_cache(
            **prefill(batch_offsets_units="elements", actual_seq_lens_q=ints(1, 1, 1).view(3, 1, 1, 1))
        )


def test_quirk_cudnn_scales_offsets_by_width():
    run, given = module("cudnn").cudnn_batch_prefill_with_kv_cache, prefill()
    with pytest.raises(Misuse, match="strides of q"):
        run(**{**given, "q": torch.cat((given["q"], given["q"]), 1)[:, : given["q"].shape[1]]})
    for name in "qkv":
        with pytest.raises(Misuse, match=f"strides of {name}"):
            ragged("cudnn").run(**{**ROWS, name: torch.cat((ROWS[name], ROWS[name]), 1)[:, :4]})


def test_quirk_cudnn_lengths_of_one_axis():
    cudnn = module("cudnn")
    for run, given in (
        (cudnn.cudnn_batch_decode_with_kv_cache, pages()),
        (cudnn.cudnn_batch_prefill_with_kv_cache, prefill()),
    ):
        with pytest.raises(Misuse, match="wrongly"):
            run(**{**given, "actual_seq_lens_kv": ints(5, 20, 9)})


def test_quirk_cudnn_lse_is_padded():
    run = module("cudnn").cudnn_batch_prefill_with_kv_cache
    _, packed = run(**prefill())
    _, padded = run(**prefill(lse=None))
    assert padded.shape == (3, 16, 4)
    assert torch.equal(padded[:, 0], packed)
    _, natural = run(**prefill(lse_base="ln"))
    assert torch.allclose(natural, packed * math.log(2))
    with pytest.raises(Refused, match="packed lse"):
        run(**prefill(batch_offsets_stats=None))


def test_quirk_cudnn_reads_tables_whole():
    run = module("cudnn").cudnn_batch_decode_with_kv_cache
    out, lse = run(**pages(return_lse=True))
    assert (out.shape, lse.shape) == ((3, 4, 128), (3, 4))
    assert not torch.equal(run(**pages(window_left=3)), out)
    with pytest.raises(Misuse, match="beyond"):
        run(**pages(max_sequence_kv=64))
    with pytest.raises(Misuse, match="longest"):
        run(**pages(max_sequence_kv=16))


def fmha(arch, **more):
    q, k, v = (ROWS[n].contiguous() for n in "qkv")
    layout = more.get("input_layout", "SEPARATE_Q_K_V")
    given = {
        "qkv": (q, k, v) if layout == "SEPARATE_Q_K_V" else (q, torch.stack((k, v), 1)), "input_layout": layout,
        "workspace_buffer": SPACE, "seq_lens": ints(2, 3), "max_q_len": 3, "max_kv_len": 3, "bmm1_scale": 0.1,
        "bmm2_scale": 1.0, "batch_size": 2, "cum_seq_lens_q": ints(0, 2, 5), "cum_seq_lens_kv": ints(0, 2, 5), **more,
    }  # fmt: skip
    return module("prefill", arch).trtllm_fmha_v2_prefill(**given)


def test_quirk_fmha_v2_layouts():
    stacked = fmha("sm_120", input_layout="CONTIGUOUS_Q_KV")
    assert torch.equal(stacked, fmha("sm_90"))
    with pytest.raises(Refused, match="SEPARATE_Q_K_V"):
        fmha("sm_120")
    with pytest.raises(Refused, match="majors"):
        fmha("sm_100")


def test_quirk_fmha_v2_is_causal():
    assert not torch.equal(fmha("sm_90"), fmha("sm_90", mask_mode="padding"))
    with pytest.raises(Refused, match="causal"):
        fmha("sm_90", mask_mode="padding", window_left=3)


def test_quirk_fmha_v2_strides_by_shape():
    q = torch.zeros(5, 4, 256, dtype=torch.bfloat16)[..., :128]
    with pytest.raises(Misuse, match="strides"):
        fmha("sm_90", qkv=(q, ROWS["k"], ROWS["v"]))


def test_quirk_fmha_v2_float16():
    with pytest.raises(Misuse, match="float16"):
        fmha("sm_90", qkv=tuple(ROWS[n].half() for n in "qkv"))


def test_quirk_fmha_v2_stats_end_the_process():
    with pytest.raises(Misuse, match="end the process"):
        fmha("sm_90", save_softmax_stats=True)


PLAN = (ints(0, 2, 3), ints(0, 2, 3), ints(3, 1, 2), ints(1, 4), 4, 2)


def with_sinks(width, **more):
    made = module("attention").BatchAttentionWithAttentionSinkWrapper(
        SPACE, backend="fa2", head_dim_qk=width, head_dim_vo=width, window_left=more.get("window_left", -1)
    )
    made.plan(*PLAN, width, 4, **{"causal": True, **BF16, **more})
    return made, (random(3, 4, width), (random(4, 4, 2, width), random(4, 4, 2, width)))


def test_quirk_sink_wrapper_names_no_width():
    with_sinks(64)
    with_sinks(64, window_left=3)
    with pytest.raises(Misuse, match="loaded"):
        with_sinks(128)


def test_quirk_sinks_follow_the_cache():
    made, given = with_sinks(64)
    sinks = torch.ones(4)
    with_them = made.run(*given, sinks, 0.1)
    assert not torch.equal(with_them, made.run(*given, torch.full((4,), -math.inf), 0.1))
    assert torch.equal(made.run(*given, sinks), made.run(*given, sinks, 64**-0.5))
    with pytest.raises(Misuse, match="null pointer"):
        made.run(*given)
    with pytest.raises(Misuse, match="float32"):
        made.run(*given, sinks.bfloat16(), 0.1)


def test_quirk_sink_variant_drops_caps_and_masks():
    for more in ({"logits_soft_cap": 2.0}, {"custom_mask": torch.ones(14, dtype=torch.bool)}):
        with pytest.raises(Misuse, match="drops"):
            with_sinks(64, **more)
