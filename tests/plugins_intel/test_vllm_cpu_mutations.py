"""Each mistake an adapter of ``vllm_cpu`` could make, made, and noticed by the checks of the right one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from vllm_cpu_cases import MIXED, SLOPES, Step, bind, device, spec, step

from numerics.kernel_cases import Lengths
from simulators.harness import Mutation, mutated

pytestmark = pytest.mark.usefixtures("vllm_cpu")
OTHER = Lengths((1, 1, 1, 5, 40, 4), (64, 30, 200, 9, 90, 30))


def mutant(name: str, old: str, new: str) -> AbstractContextManager[None]:
    return mutated(Mutation(name, "attn_plugin_intel.kernels.vllm_cpu", old, new))


def once(s: Step) -> list[str]:
    return s.wrong(s.run())


def refilled(s: Step) -> list[str]:
    return once(step(s.group, OTHER, plan=s.plan, seed=1))


def other_pages(s: Step) -> list[str]:
    return once(step(s.group, MIXED, plan=s.plan, seed=1))


CALL = "softcap, s.metadata, sinks, None,\n            )  # fmt: skip\n        return"
WINDOW = "return -1 if b.sliding_window is None else b.sliding_window"
REFILL = "out.query_starts, out.kv_lens, out.block_table, out.metadata = starts, lens, table, metadata"
HALVES = "keys, values = halves(kv_cache)\n        if quantised:\n            store"
SCALES = "sinks, None, kv_cache.k_scale, kv_cache.v_scale"
MUTANTS: dict[str, tuple[str, str, dict[str, Any], Callable[[Step], list[str]]]] = {
    "scale of the width": ("b.scale, _window(b)", "b.head_dim**-0.5, _window(b)", {"scale": 0.3}, once),
    "window one short": (WINDOW, f"{WINDOW} - 1", {"sliding_window": 20}, once),
    "window one long": (WINDOW, f"{WINDOW} + 1", {"sliding_window": 20}, once),
    "window dropped": (WINDOW, "return -1", {"sliding_window": 20}, once),
    "sinks dropped": (CALL, CALL.replace("sinks, None", "None, None"), {"sinks": True}, once),
    "softcap dropped": ("b.spec.logit_softcap or 0.0", "0.0", {"logit_softcap": 2.0}, once),
    "slopes dropped": ("None if b.alibi_slopes is None else", "None if b else", {"alibi_slopes": SLOPES}, once),
    "cross made causal": ("b.dtype, b.spec.causal, b.scale", "b.dtype, True, b.scale", {"attn_type": "cross"}, once),
    "metadata kept": (REFILL, REFILL.replace(", out.metadata", "").replace(", metadata", ""), {}, refilled),
    "lengths kept": (REFILL, REFILL.replace(" out.kv_lens,", "").replace(" lens,", ""), {}, refilled),
    "pages kept": (REFILL, REFILL.replace(" out.block_table,", "").replace(" table,", ""), {}, other_pages),
    "k and v exchanged": (HALVES, HALVES.replace("keys, values", "values, keys"), {}, once),
}
QUANTISED = {
    "scale of k for v": (SCALES, SCALES.replace("v_scale", "k_scale")),
    "no scales when writing": ("slots, isa, kv_cache.k_scale, kv_cache.v_scale, kv", "slots, isa, 1.0, 1.0, kv"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, dtype: str) -> None:
    old, new, fields, run = MUTANTS[name]
    s = spec(dtype=dtype, **fields)
    assert not run(step(bind(s)))
    with mutant(name, old, new):
        assert run(step(bind(s)))


@pytest.mark.parametrize("name", QUANTISED)
def test_mistakes_with_scales_are_noticed(name: str) -> None:
    if "avx512" not in device().isa:
        pytest.skip("8-bit caches need AVX-512, which this build does without")
    s, options, scales = spec(), {"kv_cache_dtype": "fp8_e4m3"}, (0.5, 0.03)
    assert not once(step(bind(s, **options), scales=scales))
    with mutant(name, *QUANTISED[name]):
        assert once(step(bind(s, **options), scales=scales))


def test_bounds_taken_for_lengths_are_noticed() -> None:
    run = {"lengths": Lengths((1, 1, 5), (97, 33, 64)), "bounds": (120, 40, 64)}
    group = bind(spec(), host_lengths="bounds")
    assert not once(step(group, **run))
    with mutant("bounds", "batch.kv_lens_device.contiguous()", "batch.kv_lens.contiguous()"):
        assert once(step(bind(spec(), host_lengths="bounds"), **run))


def test_a_writer_for_other_instructions_is_noticed() -> None:
    if not device().isa >= {"amx_tile", "amx_bf16"}:
        pytest.skip("AVX2 and AVX-512 lay out pages alike; AMX is another matter, and this CPU has none")
    s = spec(dtype="bfloat16")
    with mutant(
        "vec", "halves, dtype, kv_cache_dtype = halves_of(b), b.dtype, _kv_cache_dtype(b)",
        'isa, halves, dtype, kv_cache_dtype = "vec", halves_of(b), b.dtype, _kv_cache_dtype(b)',
    ):  # fmt: skip
        assert once(step(bind(s)))
