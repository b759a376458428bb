"""fa4 of two packages against their stand-ins; 8-bit caches through vLLM's alone."""

from __future__ import annotations

import pytest
import torch

from attn_core.errors import NoBackendError
from simulators import cuda_fa4, cuda_vllm_flash
from simulators.harness import (
    CROSS,
    MANY,
    RAGGED,
    VERIFY,
    Case,
    attempts,
    bound,
    caught,
    check,
    device,
    mutations,
    rows_of,
)
from simulators.isolation import check_isolation, check_two_devices

KERNELS = "attn_plugin_cuda.kernels"
STAND_INS = {"fa4:bind": cuda_fa4.stand_in, "flash:bind_vllm_fa4": lambda: cuda_vllm_flash.stand_in(10)}
ROWS = {bind: rows_of("cuda", device("cuda", "sm_100"), "fa4", bind=f"{KERNELS}.{bind}") for bind in STAND_INS}
OWN, VLLM = STAND_INS
FP8 = {"options": {"kv_cache_dtype": "fp8_e4m3"}, "q_dtype": torch.float8_e4m3fn}
ENCODER = {"attn_type": "encoder_only"}

GRID = [
    *(Case(name=f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(Case(name=f"width {d}", spec={"head_dim": d}) for d in (8, 72, 128, 256)),
    Case(name="192 and 128", spec={"head_dim": 192, "v_head_dim": 128}),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="own scale", spec={"scale": 0.3}),
    Case(name="softcap", spec={"logit_softcap": 2.0}),
    Case(name="sinks", spec={"sinks": True}),
    *(Case(name=f"window {w}", spec={"sliding_window": w}) for w in (1, 5, 33)),
    Case(name="all at once", spec={"sinks": True, "sliding_window": 7, "logit_softcap": 2.0, "scale": 0.2}),
    Case(name="bounds", options={"host_lengths": "bounds"}, bounds=(12, 4, 64, 9, 33, 5)),
    Case(name="verify", options={"verify_width": 3}, lengths=VERIFY, batch={"decode_width": 3}),
    Case(name="no lse", lse=False),
    Case(name="cross", spec={"attn_type": "cross"}, lengths=CROSS),
    Case(name="encoder", spec=ENCODER, lengths=RAGGED),
    Case(name="encoder window", spec={**ENCODER, "sliding_window": 6}, lengths=RAGGED),
    Case(name="encoder softcap", spec={**ENCODER, "logit_softcap": 2.0, "scale": 0.2}, lengths=RAGGED),
]


EIGHT_BIT = [
    Case(name="fp8", scales=(0.5, 0.25), **FP8),
    Case(
        name="fp8 per head", scales=(torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.25, 1.5, 0.5])), **FP8,
    ),
    Case(name="fp8 192 and 128", spec={"head_dim": 192, "v_head_dim": 128}, scales=(0.5, 0.25), **FP8),
    Case(name="fp8 sinks", spec={"sinks": True, "sliding_window": 7}, scales=(0.5, 0.25), **FP8),
    Case(name="fp8 one kv head", spec={"num_heads": 8, "num_kv_heads": 1}, scales=(0.5, 0.25), **FP8),
]  # fmt: skip
CASES = {OWN: GRID, VLLM: [*(c for c in GRID if c.name != "width 256"), *EIGHT_BIT]}


def make(package):
    return lambda: [STAND_INS[package]()]


@pytest.mark.parametrize(("package", "case"), [pytest.param(p, c, id=f"{p} {c.name}") for p in ROWS for c in CASES[p]])
def test_grid(package, case):
    check(ROWS[package], case, *make(package)())


REFUSED = {
    OWN: EIGHT_BIT[:1],
    VLLM: [
        Case(name="width 256", spec={"head_dim": 256}),
        Case(name="fp8 under float16", spec={"dtype": "float16"}, **FP8),
        Case(name="fp8 in rows of 8 bytes", spec={"head_dim": 72}, **FP8),
        Case(name="fp8 of the other kind", options={"kv_cache_dtype": "fp8_e5m2"}),
        Case(name="pages of 64", options={"page_size": 64}),
    ],
}


@pytest.mark.parametrize(
    ("package", "case"), [pytest.param(p, c, id=f"{p} {c.name}") for p, cases in REFUSED.items() for c in cases]
)
def test_what_a_package_lacks_is_refused(package, case):
    with pytest.raises(NoBackendError):
        bound(ROWS[package], case)


MUTATIONS = mutations(f"{KERNELS}.fa4", {
    "scale dropped": ("softmax_scale=scale, ", "", 2),
    "causality dropped": ("b.scale, b.spec.causal", "b.scale, False"),
    "encoders causal": ("causal=False", "causal=True"),
    "window dropped": ("window_size=window, ", "", 2),
    "one side open": ("window, softcap = both_sides(b)", "window, softcap = (both_sides(b)[0], -1)"),
    "sinks dropped": (" learnable_sink=sinks,", ""),
    "softcap dropped": ("            softcap=softcap, return_lse", "            return_lse"),
    "encoder's softcap dropped": ("window_size=window, softcap=softcap,\n", "window_size=window,\n"),
    "offsets for lengths": ("seqused_k=step.kv_lens", "cu_seqlens_k=step.kv_lens"),
    "lse heads first": ("(o, lse.T)", "(o, lse)", 2),
    "always a pair": ("(o, lse.T) if return_lse else o", "(o, lse)", 2),
    "longest swapped": ("max_seqlen_q=step.max_query, max_seqlen_k=step.max_kv,", "max_seqlen_q=step.max_kv, max_seqlen_k=step.max_query,"),
    "offsets swapped": ("cu_seqlens_q=step.cu_query, cu_seqlens_k=step.cu_kv", "cu_seqlens_q=step.cu_kv, cu_seqlens_k=step.cu_query * 2"),
})  # fmt: skip


MUTATIONS_OF_VLLM = mutations(f"{KERNELS}.flash", {
    "vllm fa4 as fa3": ("vllm(VLLM_FA4, 4)", "vllm(VLLM_FA4, 3)"),
    "vllm fa4 with metadata": ("schedules=version == 3", "schedules=True"),
    "vllm fa4 scale dropped": ('"softmax_scale": b.scale, ', ""),
    "vllm fa4 window dropped": ('"window_size": both_sides(b),', ""),
    "vllm fa4 sinks dropped in 8 bits": ('{sinks_as: sinks, "out": out}', '{"out": out}', 3),
    "vllm fa4 k descale dropped": ("            k_descale=kv_cache.k_scale_t.expand(step.rows, kv_heads),\n", ""),
    "vllm fa4 v descale dropped": ("            v_descale=kv_cache.v_scale_t.expand(step.rows, kv_heads),\n", ""),
    "vllm fa4 descales swapped": ("k_descale=kv_cache.k_scale_t", "k_descale=kv_cache.v_scale_t"),
    "vllm fa4 descales as they are": ("k_descale=kv_cache.k_scale_t.expand(step.rows, kv_heads)", "k_descale=kv_cache.k_scale_t"),
    "vllm fa4 descales of all heads": ("k_descale=kv_cache.k_scale_t.expand(step.rows, kv_heads)", "k_descale=kv_cache.k_scale_t[..., :1].expand(step.rows, kv_heads) if kv_cache.k_scale_t.dim() else kv_cache.k_scale_t.expand(step.rows, kv_heads)"),
    "vllm fa4 q in 16 bits": ("q.clamp(-limit, limit).to(torch.float8_e4m3fn)", "q"),
    "vllm fa4 chosen by the model's dtype": ("if b.kv_dtype == torch.float8_e4m3fn", "if b.dtype == torch.float8_e4m3fn"),
    "vllm fa4 out ignored": ('"out": out', '"out": None', 3),
})  # fmt: skip
ALL_MUTATIONS = [*((OWN, m) for m in MUTATIONS), *((VLLM, m) for m in MUTATIONS_OF_VLLM)]


@pytest.mark.parametrize(("package", "mutation"), ALL_MUTATIONS, ids=lambda x: getattr(x, "what", ""))
def test_mutations_are_caught(package, mutation):
    assert caught(mutation, attempts(ROWS[package], CASES[package], make(package)))


def in_flight(package):
    names = ("plain mixed", "window 5", "sinks", "verify", "encoder", "fp8 per head")
    return [(ROWS[package], c) for c in CASES[package] if c.name in names]


@pytest.mark.parametrize("package", ROWS)
def test_groups_and_batches_in_flight_do_not_meet(package):
    check_isolation(in_flight(package), make(package))


@pytest.mark.parametrize("package", ROWS)
def test_two_devices(package):
    check_two_devices(in_flight(package), make(package))
