"""flashmla, cutlass_mla, trtllm_mla and cutedsl_mla against their stand-ins."""

from __future__ import annotations

import pytest
import torch

from attn_core.errors import NoBackendError
from attn_core.runtime import Capture
from attn_core.testing.compare import differences
from simulators import cuda_cutlass_mla, cuda_flash_mla, cuda_flashinfer
from simulators.harness import (
    DECODE,
    PREFILL,
    VERIFY,
    Case,
    Lengths,
    attempts,
    bound,
    caught,
    check,
    device,
    make_step,
    mutations,
    rows_of,
    wrong_materialised,
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

KERNELS = "attn_plugin_cuda.kernels"
H100, B200 = device("cuda", "sm_90"), device("cuda", "sm_100")


def vllms_flashmla():
    """Without sgl-flash-mla."""
    rows, rules, where = rows_of("cuda", H100, "flashmla")
    return tuple(r for r in rows if all(x.name != "sgl-flash-mla" for x in r.requires)), rules, where


ROWS = {
    "flashmla": rows_of("cuda", H100, "flashmla"),
    "flashmla of vllm": vllms_flashmla(),
    **{name: rows_of("cuda", B200, name) for name in ("cutlass_mla", "trtllm_mla", "cutedsl_mla")},
}
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
Q8 = torch.float8_e4m3fn
LSE = {"flashmla": True, "flashmla of vllm": True, "cutlass_mla": True, "trtllm_mla": False, "cutedsl_mla": True}


def make():
    return [*cuda_flash_mla.stand_ins(), cuda_flash_mla.vllm(), cuda_flashinfer.stand_in(), cuda_cutlass_mla.stand_in()]


def cases(backend):
    if backend == "flashmla of vllm":
        yield from fp8_cases()
        return

    def case(name, spec=None, **fields):
        return Case(
            name=name, spec={"kind": "mla", **(spec or {})}, **{"lse": LSE[backend], "lengths": DECODE, **fields}
        )

    yield case("decode")
    yield case("scale", {"scale": 0.1})
    yield case("eight heads", {"num_heads": 8})
    yield case("no lse", lse=False)
    if backend != "trtllm_mla":
        yield case("float16", {"dtype": "float16"})
    if backend != "cutlass_mla":
        yield case("verify", lengths=VERIFY, options={"verify_width": 3}, batch={"decode_width": 3})
    if backend == "cutlass_mla":
        yield case("split", mla_query="split")
    if backend in ("trtllm_mla", "cutedsl_mla"):
        yield case("pages of 32", options={"page_size": 32})
    if backend != "flashmla":
        yield case("fp8", options=FP8, scales=(0.5, 1.0), q_dtype=Q8, ulps=3)
    else:
        yield from fp8_cases()


def fp8_cases():
    """Of FlashMLA's dense kernel, from either package."""

    def case(name, spec=None, **fields):
        more = {"options": FP8, "scales": (0.5, 1.0), "lengths": DECODE, **fields}
        return Case(name=f"fp8 {name}", spec={"kind": "mla", **(spec or {})}, q_dtype=Q8, ulps=3, **more)

    yield case("decode")
    yield case("scale", {"scale": 0.1})
    yield case("eight heads", {"num_heads": 8}, scales=(2.0, 1.0))
    yield case("no lse", lse=False)
    yield case("verify", lengths=VERIFY, options={**FP8, "verify_width": 3}, batch={"decode_width": 3})


GRID = [pytest.param(b, c, id=f"{b} {c.name}") for b in ROWS for c in cases(b)]


@pytest.mark.parametrize(("backend", "case"), GRID)
def test_grid(backend, case):
    check(ROWS[backend], case, *make())


def materialised(backend, **spec):
    with installed(*make()):
        group = bound(ROWS[backend], Case(name="", spec={"kind": "mla", **spec}, lse=LSE[backend] and backend != "x"))
    long = Lengths((5, 3), (90, 40))
    return [*wrong_materialised(group, PREFILL, chunk_tokens=24), *wrong_materialised(group, long)]


@pytest.mark.parametrize("backend", ROWS)
def test_materialised(backend):
    assert not materialised(backend)


MUTATIONS = [
    *(("flashmla", m) for m in mutations(f"{KERNELS}.flashmla", {
        "flashmla scale dropped": ("softmax_scale=scale, causal=True, **always", "causal=True, **always"),
        "flashmla not causal": ("softmax_scale=scale, causal=True, **always", "softmax_scale=scale, **always"),
        "flashmla on the current kernels": ('"use_legacy": True', '"use_legacy": False'),
        "flashmla schedule of one query": ("step.max_query * heads, 1", "heads, 1"),
        "flashmla schedule of the other kernels": ("get_metadata(*args, **always)", "get_metadata(*args)"),
        "flashmla schedule kept": ("        step.take(*get", "        step.tiles is None and step.take(*get"),
        "flashmla schedule left to the first layer": ("made.tile_scheduler_metadata, made.num_splits = step.tiles, step.splits", "made.num_splits = None"),
        "flashmla lse mixed": ("lse.transpose(1, 2).flatten(0, 1)", "lse.flatten(0, 1)", 2),
        "flashmla pair returned": ("flatten(0, 1)) if return_lse else o", "flatten(0, 1))", 2),
        "flashmla rows and queries swapped": ("(step.rows, step.max_query, heads", "(step.max_query, step.rows, heads", 2),
        "flashmla fp8 taken for 16 bits": ('"is_fp8_kvcache": b.kv_dtype == torch.float8_e4m3fn', '"is_fp8_kvcache": False'),
        "flashmla 16 bits taken for fp8": ('"is_fp8_kvcache": b.kv_dtype == torch.float8_e4m3fn', '"is_fp8_kvcache": True'),
    })),
    *(("flashmla of vllm", m) for m in mutations(f"{KERNELS}.flashmla", {
        "vllm flashmla scale dropped": ("softmax_scale=scale, causal=True, descale_q", "causal=True, descale_q"),
        "vllm flashmla not causal": ("causal=True, descale_q", "causal=False, descale_q"),
        "vllm flashmla q's descale of the cache": ("descale_q=one", "descale_q=stored"),
        "vllm flashmla k's descale dropped": ("descale_k=stored", "descale_k=one"),
        "vllm flashmla descale of the values": ("kv_cache.k_scale_t.reshape(1)", "kv_cache.v_scale_t.reshape(1)"),
        "vllm flashmla descale without an axis": ("kv_cache.k_scale_t.reshape(1)", "kv_cache.k_scale_t"),
        "vllm flashmla descale in the model's dtype": ("torch.ones(1, dtype=torch.float32", "torch.ones(1, dtype=b.dtype"),
        "vllm flashmla q in 16 bits": ("        q = q.clamp(-limit, limit).to(torch.float8_e4m3fn)\n", ""),
        "vllm flashmla tiles and splits swapped": ("(step.tiles, step.splits), {}", "(step.splits, step.tiles), {}"),
        "vllm flashmla schedule of one query": ("step.max_query * heads, 1", "heads, 1"),
        "vllm flashmla as the others are called": ("(step.tiles, step.splits), {})", "(step.tiles, step.splits), {'is_fp8_kvcache': True})"),
        "vllm flashmla lse mixed": ("lse.transpose(1, 2).flatten(0, 1)", "lse.flatten(0, 1)", 2),
    })),
    *(("cutlass_mla", m) for m in mutations(f"{KERNELS}.cutlass_mla", {
        "cutlass scale of its own": ("scale * stored", "576**-0.5 * stored"),
        "cutlass fp8 scale dropped": ("scale * stored", "scale"),
        "cutlass fp8 values unscaled": ("            out.mul_(stored)\n", "            pass\n"),
        "cutlass parts swapped": ("q_latent, q_rope, kv_cache", "q_rope, q_latent, kv_cache"),
        "cutlass parts cut elsewhere": ("q.split_with_sizes(widths, -1)", "q.split_with_sizes(widths[::-1], -1)[::-1]"),
        "cutlass lse missing": ("if return_lse else nothing", "if False else nothing"),
        "cutlass lse in halves": ("dtype=torch.float32) if", "dtype=dtype) if"),
        "cutlass out in q's dtype": ("q_latent.new_empty((step.rows, *shape), dtype=dtype)", "q_latent.new_empty((step.rows, *shape))"),
        "cutlass small workspace": ("torch.empty(size, dtype", "torch.empty(size // 1000, dtype"),
        "cutlass lengths of queries": ("step.kv_lens, step.table, step.workspace", "step.kv_lens * 0 + 1, step.table, step.workspace"),
    })),
    *(("cutedsl_mla", m) for m in mutations(f"{KERNELS}.trtllm_mla", {
        "trtllm mla scale default": ("bmm1_scale=scale * stored, ", ""),
        "trtllm mla cache scale dropped": ("bmm1_scale=scale * stored", "bmm1_scale=scale"),
        "trtllm mla values unscaled": ("bmm2_scale=stored, ", ""),
        "trtllm mla widths swapped": ("nope, latent, rope, step", "nope, rope, latent, step"),
        "trtllm mla the wrong nope": ("rope, nope, limit = b.head_dim - latent, b.spec.nope_dim", "rope, nope, limit = b.head_dim - latent, b.spec.head_dim"),
        "trtllm mla lse in the wrong base": ("got[1].reshape(o.shape[:2])", "got[1].reshape(o.shape[:2]) * LN2"),
        "trtllm mla q not in fp8": ("        if fp8:\n", "        if False:\n"),
        "trtllm mla left to auto": ("backend=path, ", ""),
        "trtllm mla modular": ('"monolithic"', '"modular"'),
        "trtllm mla table not widened": ("table_multiple=128 // page_size", "table_multiple=1"),
    })),
    *(("trtllm_mla", m) for m in mutations(f"{KERNELS}.trtllm_mla", {
        "trtllm mla counters left out": ("multi_ctas_kv_counter_buffer=step.counters, ", ""),
        "trtllm ragged lse in base 2": ("(got[0], got[1] * LN2)", "(got[0], got[1])"),
        "trtllm ragged rows without keys": ("if step.blind is None else (batch", "if True else (batch"),
        "trtllm ragged causal context": ("scale, causal, device = b.scale, b.spec.causal", "scale, causal, device = b.scale, True"),
        "trtllm ragged scale dropped": ("step.max_kv, scale, 1.0", "step.max_kv, 1.0, 1.0"),
        "trtllm ragged offsets swapped": ("step.cu_query, step.cu_kv, None", "step.cu_kv, step.cu_query, None"),
    })),
]  # fmt: skip


def everything(backend):
    yield from attempts(ROWS[backend], cases(backend), make)
    yield lambda: materialised(backend)


@pytest.mark.parametrize(("backend", "mutation"), MUTATIONS, ids=lambda x: getattr(x, "what", ""))
def test_mutations_are_caught(backend, mutation):
    assert caught(mutation, everything(backend))


IN_FLIGHT = [
    (ROWS[b], c) for b in ROWS for c in cases(b) if c.name.removeprefix("fp8 ") in ("decode", "eight heads", "verify")
]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)


@pytest.mark.parametrize("backend", ROWS)
def test_a_captured_plan_keeps_its_addresses(backend):
    def addresses(step):
        tensors = {n: getattr(step, n) for n in ("kv_lens", "table", "workspace", "counters") if hasattr(step, n)}
        if "flashmla" in backend:
            tensors.update(tiles=step.tiles, splits=step.splits)
        return {n: t.data_ptr() for n, t in tensors.items()}

    with installed(*make()):
        group = bound(ROWS[backend], Case(name="", spec={"kind": "mla"}, options={"graph": "decode"}, lse=LSE[backend]))
    made = [make_step(group, Case(name="", lengths=Lengths((1,) * 6, lens)), i) for i, lens in
            enumerate(((9, 1, 37, 150, 3, 2), (70, 5, 1, 8, 140, 99)))]  # fmt: skip
    plan = group.plan(made[0].batch, capture=Capture(max_seqs=6, decode_width=1, max_kv_len=200))
    before = addresses(plan.decode)
    made[1].plan = group.plan(made[1].batch, out=plan)
    assert addresses(plan.decode) == before
    made[1].q = made[1].q.to(Q8).to(made[1].q.dtype)  # as the kernels of fp8 caches round it
    out = made[1].run()
    assert not differences(out, made[1].want()[0], out.dtype)


def test_fp8_under_float16_is_refused_when_resolving():
    for backend in ("cutlass_mla", "cutedsl_mla", "flashmla", "flashmla of vllm"):
        with pytest.raises(NoBackendError, match="bfloat16"):
            bound(ROWS[backend], Case(name="", spec={"kind": "mla", "dtype": "float16"}, options=FP8))
