"""What fused infer attention is known not to do is refused when asked for, never dropped and never tried."""

from __future__ import annotations

import pytest
from test_ascend_adapters import ROWS

from attn_core import NoBackendError
from simulators import ascend_npu
from simulators.harness import Case, bound, device, rows_of
from simulators.standin import installed

REFUSED = [
    ("pages of 16 pass the kernel's check and corrupt", {}, {"page_size": 16}),
    ("pages of 64", {}, {"page_size": 64}),
    ("no softcap", {"logit_softcap": 30.0}, {}),
    ("no alibi", {"alibi_slopes": (0.5,) * 6}, {}),
    ("no bias in packed layouts", {"bias": True}, {}),
    ("no chunks", {"attention_chunk": 64}, {}),
    ("caches of the model's dtype only: int8", {}, {"kv_cache_dtype": "int8"}),
    ("caches of the model's dtype only: fp8", {}, {"kv_cache_dtype": "fp8_e4m3"}),
    ("17 queries a decode row", {}, {"verify_width": 17}),
    ("no trees", {}, {"verify_width": 3, "tree_mask": True}),
    ("65 queries a key head", {"num_heads": 65, "num_kv_heads": 1}, {}),
    ("257 heads", {"num_heads": 257, "num_kv_heads": 257}, {}),
    ("4097 rows", {}, {"max_num_seqs": 4097}),
    ("width 96", {"head_dim": 96}, {}),
    ("float32", {"dtype": "float32"}, {}),
    ("lengths that only the device knows", {}, {"host_lengths": "bounds"}),
    ("graphs of whole steps", {}, {"graph": "full"}),
    ("MLA: 129 heads", {"kind": "mla", "num_heads": 129}, {"lse": False}),
    ("MLA: LSE of latents", {"kind": "mla"}, {"lse": True}),
    ("MLA: float16", {"kind": "mla", "dtype": "float16"}, {"lse": False}),
    ("MLA: 17 queries a decode row", {"kind": "mla"}, {"lse": False, "verify_width": 17}),
    ("MLA: token-sparse", {"kind": "mla", "sparse": "dsa", "topk": 64}, {"lse": False}),
]


@pytest.mark.parametrize(("spec", "options"), [x[1:] for x in REFUSED], ids=[x[0] for x in REFUSED])
def test_refused(spec, options):
    with installed(ascend_npu.stand_in()), pytest.raises(NoBackendError):
        bound(ROWS, Case(name="", spec=spec, options=options))


@pytest.mark.parametrize(("heads", "given"), [(1, 1), (3, 4), (5, 8), (64, 64), (100, 128)])
def test_heads_of_latents_grow_to_a_power_of_two(heads, given):
    with installed(ascend_npu.stand_in()):
        group = bound(ROWS, Case(name="", spec={"kind": "mla", "num_heads": heads}, lse=False))
    assert group.bindings["decode"].num_heads == given


def test_a5_has_no_mla():
    rows = rows_of("ascend", device("ascend", "950"), "ascend")
    with installed(ascend_npu.stand_in()):
        bound(rows, Case(name=""))
        with pytest.raises(NoBackendError, match=r"device\.arch=950"):
            bound(rows, Case(name="", spec={"kind": "mla"}, lse=False))


@pytest.mark.parametrize(("arch", "spec"), [("310p", {}), ("910b", {"dtype": "float16"})])
def test_the_other_generations_kernels_do_not_serve(arch, spec):
    """310P has no bfloat16, and A2 no fractal caches."""
    rows = rows_of("ascend", device("ascend", arch), "ascend")
    layout = "NHD" if arch == "310p" else "ASCEND_NZ"
    with installed(ascend_npu.stand_in()), pytest.raises(NoBackendError):
        bound(rows, Case(name="", spec=spec, options={"kv_layout": layout}))
