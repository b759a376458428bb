"""What the product launches, compiled for architectures that are not here: it compiles, fits, does not spill, and
multiplies on the matrix units. Some pairs by default, all of them behind ``slow``; docs/kernels.md prints the lot.
"""

from __future__ import annotations

import os

import pytest
import torch
from aot import Launch, compiled, recorded
from aot_cases import ARCHS, CASES, SHARED, bind, device, heads, refused

from attn_core.backends.triton import config
from attn_core.backends.triton.widths import parts
from attn_core.runtime import Batch, KVCache
from attn_core.runtime.plan import Capture

PAIRS = [
    ("decode 128", "sm_80"), ("decode 128", "sm_90"), ("decode 128", "sm_121"), ("decode 128", "gfx942"),
    ("decode 128", "gfx1201"), ("decode 64, sinks, window", "sm_86"), ("decode 64, sinks, window", "sm_120"),
    ("decode 256, softcap", "sm_100"), ("decode 128, fp8", "sm_89"), ("decode MLA", "sm_90"), ("decode MLA", "sm_80"),
    ("decode MLA", "gfx950"), ("decode MLA", "sm_75"), ("decode MLA, sparse", "sm_75"), ("verify 128, tree", "sm_110"),
    ("prefill 128", "sm_90"), ("prefill 128", "sm_103"),
    ("prefill 128", "sm_120"), ("prefill 128", "gfx90a"), ("prefill 64, sinks, window", "sm_80"),
    ("prefill 256, softcap", "sm_90"), ("prefill MLA 192/128", "sm_100"), ("encode 32", "sm_75"),
    ("encode 32", "gfx1100"), ("decode 128", "gfx1250"), ("merge 128", "sm_90"),
    ("merge_state 128", "sm_90"), ("merge_state 128", "gfx942"), ("write 128, fp8", "sm_89"),
    ("gather MLA", "gfx942"),
]  # fmt: skip
SPILLS = {
    ("verify 128, tree", "gfx1100"): 12, ("decode 128, alibi, bias", "gfx1100"): 13,
    ("decode MLA, sparse", "gfx1250"): 39,
}  # fmt: skip
"""Decode kernels that spill a little all the same, and how many registers."""
MATRIX = {
    "sm_75": {""}, "sm_80": {"mma.sync"}, "sm_86": {"mma.sync"}, "sm_89": {"mma.sync"}, "sm_120": {"mma.sync"},
    "sm_121": {"mma.sync"}, "sm_90": {"mma.sync", "wgmma.mma_async"}, "sm_100": {"mma.sync", "tcgen05.mma"},
    "sm_103": {"mma.sync", "tcgen05.mma"}, "sm_110": {"mma.sync", "tcgen05.mma"}, "gfx90a": {"v_mfma"},
    "gfx942": {"v_mfma"}, "gfx950": {"v_mfma"}, "gfx1100": {"v_wmma"}, "gfx1201": {"v_wmma"}, "gfx1250": {"v_wmma"},
}  # fmt: skip
"""Triton has no matrix instruction for Turing: its products are fused multiply-adds."""

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def table_says(launch: Launch, arch: str) -> int:
    """Bytes of shared memory by the table's own arithmetic, from which tiles were chosen."""
    c, where = launch.constants, device(arch)
    q, k = (launch.args[i] for i in (0, 2))
    buffers = max(1, (c["num_stages"] - 1) // (2 if c["PAGE"] else 1))
    tile = config.Tile(c["BLOCK_M"], c["BLOCK_N"], c["num_warps"], buffers)
    return config.shared(
        tile, parts(c["WIDTH"]), parts(c["V_WIDTH"]), config.family(where.platform, arch),
        joined=c["JOINED"] or c["HALF"] > 0,
        itemsize=q.dtype.itemsize, stored=k.dtype.itemsize,
    )  # fmt: skip


def check(name: str, arch: str) -> None:
    (launch,) = CASES[name].launches(arch)
    found = compiled(launch, arch)
    assert found.shared <= SHARED[arch] * 1024
    if "BLOCK_N" in launch.constants:
        slack = 16384 if arch == "sm_75" else 4096  # operands of multiply-adds; page ids and bools in flight
        assert found.shared <= table_says(launch, arch) + slack
    if "float32" in name:
        return
    if name.startswith(("decode", "verify", "merge", "write", "gather")):
        assert found.spills <= SPILLS.get((name, arch), 0)
    else:  # bytes of stack on NVIDIA, registers on AMD: none to speak of
        assert found.spills <= (64 if arch.startswith("sm_") else 24)
    if name.startswith(("merge", "write", "gather")):
        assert found.matrix == ""
    else:
        assert found.matrix in MATRIX[arch]
        if arch in ("sm_90", "sm_100") and name == "prefill 128":
            assert found.matrix != "mma.sync"


@pytest.mark.parametrize(("name", "arch"), PAIRS)
def test_compiled_for(name, arch):
    check(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_compiled_for_every_arch(name, arch):
    if refused(name, arch):
        pytest.skip("not claimed for this arch")
    if (name, arch) not in PAIRS:
        check(name, arch)


def test_what_is_refused_is_what_an_arch_cannot_do():
    no = {(name, arch) for name in CASES for arch in ARCHS if refused(name, arch)}
    fp8 = {(n, a) for n in CASES if "fp8" in n for a in ("sm_75", "sm_80", "sm_86")}
    wide = {(n, a) for n in CASES if "MLA" in n or "512" in n for a in ("gfx1100", "gfx1201")}
    wide |= {(n, "sm_75") for n in CASES if "512" in n and "MLA" not in n}
    too_wide = {(n, "gfx1100") for n in CASES if "256" in n}
    assert no == fp8 | wide | too_wide


def test_e4m3_is_refused_because_triton_cannot_convert_it():
    """The constraint on the rows is the compiler's own."""
    (launch,) = CASES["decode 128, fp8"].launches("sm_89")
    with pytest.raises(Exception, match="fp8e4nv not supported"):
        compiled(launch, "sm_86")


@pytest.fixture
def group():
    return bind(heads(num_heads=8, num_kv_heads=2), "sm_90", graph="decode")


def meta_step(group, queries, keys):
    table = torch.ones(len(keys), 256, dtype=torch.int32, device="meta")
    return Batch(
        queries, keys, block_table=table, slot_mapping=torch.zeros(sum(queries), dtype=torch.int64, device="meta")
    )


def test_planning_and_calling_never_wait_for_the_device():
    """On a device without values: whatever reads one raises."""
    group = bind(heads(num_heads=8, num_kv_heads=2, sinks=True), "sm_90", torch_device="meta", host_lengths="bounds")
    batch = meta_step(group, [1, 1, 40], [3000, 5, 1000])
    q = torch.empty(42, 8, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(42, 2, 128, dtype=torch.bfloat16, device="meta")
    cache: KVCache = group.new_kv_cache(8)
    with recorded() as seen:
        plan = group.plan(batch)
        plan = group.plan(batch, out=plan)
        group.forward(q, k, k, cache, plan, sinks=group.prepare_sinks(torch.empty(8, device="meta")), return_lse=True)
    assert [launch.kernel.__name__ for launch in seen] == ["write", "attend", "merge", "attend", "merge"]


def test_a_captured_plan_keeps_its_addresses_and_its_grid(group):
    capture = Capture(max_seqs=6, decode_width=1, max_kv_len=4000)
    cache = group.new_kv_cache(300)

    def launches(keys, plan=None):
        table = torch.arange(1, 1 + len(keys) * 40, dtype=torch.int32).view(len(keys), 40).repeat(1, 7)
        slots = torch.full((len(keys),), 17)
        batch = Batch([1] * len(keys), keys, block_table=table, slot_mapping=slots)
        plan = group.plan(batch, capture=capture, out=plan)
        q, k = torch.empty(6, 8, 128, dtype=torch.bfloat16), torch.empty(6, 2, 128, dtype=torch.bfloat16)
        out = torch.empty_like(q)
        with recorded() as seen:
            group.forward(q, k, k, cache, plan, out=out)
        own = {id(t) for t in (q, k, out)}
        return plan, [
            (x.kernel.__name__, x.grid, [t.data_ptr() for t in x.args if hasattr(t, "data_ptr") and id(t) not in own])
            for x in seen
        ]

    plan, first = launches([100, 4000, 7])
    kept, again = launches([4000] * 6, plan)
    assert kept is plan
    assert [x[:2] for x in again] == [x[:2] for x in first]
    assert [x[2] for x in again if x[0] != "write"] == [x[2] for x in first if x[0] != "write"]


def test_shapes_outside_the_claim_raise_with_the_limit(group):
    cache = group.new_kv_cache(8)
    plan = group.plan(Batch([1], [20], block_table=torch.ones(1, 2, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"\(tokens, 8, 128\)"):
        group.decode(torch.empty(1, 4, 128, dtype=torch.bfloat16), None, None, cache, plan)
