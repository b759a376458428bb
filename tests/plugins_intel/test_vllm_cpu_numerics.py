"""``vllm_cpu`` on this CPU against the float64 reference: every feature it claims, in every dtype.

``VLLM_CPU_BUILD=avx2`` (or ``avx512``) tests another build of the library than this CPU's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_cpu_cases import SLOPES, bind, device, spec, step

from attn_core import NoBackendError
from attn_core.runtime import adapt
from numerics.kernel_cases import Lengths

pytestmark = pytest.mark.usefixtures("vllm_cpu")
DTYPES = ("float32", "bfloat16", "float16")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window 1": {"sliding_window": 1},
    "window 8": {"sliding_window": 8},
    "window of a page": {"sliding_window": 32},
    "window over pages": {"sliding_window": 100},
    "softcap": {"logit_softcap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": SLOPES},
    "all at once": {"scale": 0.2, "sliding_window": 70, "logit_softcap": 2.0, "sinks": True, "alibi_slopes": SLOPES},
    "window and sinks": {"sliding_window": 40, "sinks": True},
    "as many kv heads": {"num_kv_heads": 6},
    "one kv head": {"num_kv_heads": 1, "sinks": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: str) -> None:
    step(bind(spec(dtype=dtype, **FEATURES[feature]))).check()


def test_gaps_in_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take the strides of out from its shape. Without the core's guard they fill the wrong places."""

    def filled() -> list[str]:
        s = step(bind(spec()))
        room = torch.zeros(s.q.shape[0], 2, *s.q.shape[1:])
        assert s.run(out=room[:, 0]).data_ptr() == room.data_ptr()
        return [*s.wrong(room[:, 0]), *(["written between the rows"] if room[:, 1].any() else [])]

    assert not filled()
    monkeypatch.setattr(adapt, "_with_packed_out", lambda call: call)
    assert filled()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512])
def test_width(width: int, dtype: str) -> None:
    group = bind(spec(dtype=dtype, head_dim=width, sinks=True))
    assert group.bindings["decode"].head_dim == width
    step(group).check()


@pytest.mark.parametrize(("width", "kernel"), [(16, 32), (40, 48), (72, 80), (144, 160), (288, 512)])
def test_other_widths_are_padded(width: int, kernel: int) -> None:
    group = bind(spec(head_dim=width))
    assert group.bindings["decode"].head_dim == kernel
    step(group).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 7, 8, 12, 16, 17, 24, 32, 48, 64])
def test_heads_per_kv_head(group_size: int, dtype: str) -> None:
    """Sinks too, but where the AMX kernel has them wrong: there they are refused."""
    sinks = not (device().isa >= {"amx_tile"} and dtype == "bfloat16" and group_size > 16)
    s = spec(num_heads=2 * group_size, num_kv_heads=2, dtype=dtype, sinks=sinks, sliding_window=600)
    if not sinks:
        with pytest.raises(NoBackendError, match="sinks"):
            bind(replace(s, sinks=True))
    step(bind(s), Lengths((1, 1, 7), (700, 33, 60))).check()


@pytest.mark.parametrize("page_size", [32, 64, 96, 128, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_size(page_size: int, dtype: str) -> None:
    step(bind(spec(dtype=dtype, sliding_window=50), page_size=page_size)).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{}, {"logit_softcap": 2.0, "sinks": True, "scale": 0.2}], ids=str)
def test_cross(dtype: str, fields: dict[str, Any]) -> None:
    s = spec(dtype=dtype, attn_type="cross", **fields)
    step(bind(s), Lengths((1, 1, 9, 40), (97, 1, 3, 130))).check()


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 20, "sinks": True}], ids=str)
def test_verify_rows(width: int, fields: dict[str, Any]) -> None:
    lengths = Lengths((width, width, width, 9, 1), (97, 40, width, 130, 60))
    step(bind(spec(**fields), verify_width=width), lengths, decode_width=width).check()


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_split_between_threads(threads: int, dtype: str) -> None:
    """A long row beside short ones: the library cuts its keys into pieces and joins them, sinks in one of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        group = bind(spec(dtype=dtype, num_heads=4, num_kv_heads=1, sinks=True))
        step(group, Lengths((1, 1, 3), (1, 3000, 35))).check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "scales"), [(64, (1.0, 1.0)), (128, (0.5, 0.03))])
def test_caches_of_eight_bits(name: str, dtype: str, width: int, scales: tuple[float, float]) -> None:
    if "avx512" not in device().isa:
        pytest.skip("8-bit caches need AVX-512, which this build does without")
    group = bind(spec(dtype=dtype, head_dim=width, sliding_window=60, sinks=True), kv_cache_dtype=name)
    step(group, scales=scales).check()


def test_lengths_that_only_the_device_knows() -> None:
    group = bind(spec(sliding_window=50), host_lengths="bounds")
    step(group, Lengths((1, 1, 5), (97, 33, 64)), bounds=(120, 40, 64)).check()
