"""310P: ATB's paged attention over fractal caches, judged by the float64 reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import captured
import pytest
import torch

from attn_core import BadInputError, Batch, NoBackendError
from attn_core.errors import MissingKernelError
from attn_core.runtime import KVCache, wrap_kv_cache
from attn_core.runtime.plan import ContextChunk
from simulators import ascend_npu
from simulators.harness import (
    DECODE,
    MANY,
    VERIFY,
    Case,
    Lengths,
    Mutation,
    attempts,
    bound,
    caught,
    check,
    device,
    make_step,
    rows_of,
)
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

ROWS = rows_of("ascend", device("ascend", "310p"), "ascend")
ATB, WRITE, NZ, NNAL = (f"attn_plugin_ascend.kernels.{name}" for name in ("atb", "kv_write", "nz", "nnal"))


def plain(heads: int) -> Callable[[KVCache], KVCache]:
    """A fractal cache as one of layout NHD, as the reference reads it."""

    def read(cache: KVCache) -> KVCache:
        data = tuple(t.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)) for t in cache.data)
        return replace(cache, data=data, layout="NHD", memo={})

    return read


def case(name: str, *, heads: int = 3, **more: Any) -> Case:
    spec = {"dtype": "float16", "num_kv_heads": heads, **more.pop("spec", {})}
    return Case(name=name, spec=spec, lse=False, plain=plain(heads), **more)


LONG = Lengths((1, 3, 2100), (2200, 2050, 2100))
"""Longer than the mask is wide."""
WIDE = {"options": {"verify_width": 3}, "batch": {"decode_width": 3}}
GRID = [
    *(case(f"plain {name}", lengths=lengths) for name, lengths in MANY.items()),
    *(case(f"width {d}", spec={"head_dim": d}) for d in (16, 80, 128)),
    case("own scale", spec={"scale": 0.3}),
    case("one kv head", heads=1, spec={"num_heads": 8}),
    case("as many kv heads", heads=6),
    case("verify", lengths=VERIFY, **WIDE),
    case("verify, some of one", options={"verify_width": 3}, lengths=DECODE),
]
VERIFIES = GRID[-2]


@pytest.mark.parametrize("given", [*GRID, case("long", lengths=LONG)], ids=lambda c: c.name)
def test_grid(given):
    check(ROWS, given, ascend_npu.stand_in())


def replayed(given: Case) -> list[str]:
    """Captured decode steps need no update: addresses stay, and lengths are read on the device."""
    npu = ascend_npu.stand_in()
    made, found = captured.capture(ROWS, given, npu), list[str]()
    for lengths in captured.STEPS:
        batch = made.fill(lengths)
        made.inputs()
        made.replay()
        made.replay()
        found += made.wrong(batch)
    return found + [n for n, _ in npu.calls if "graph_task" in n]


@pytest.mark.parametrize("given", [GRID[0], VERIFIES], ids=lambda c: c.name)
def test_replays(given):
    assert not replayed(given)


@pytest.mark.parametrize(
    ("given", "kernels"),
    [
        (GRID[0], {"_npu_paged_attention"}),
        (GRID[1], {"_npu_paged_attention_splitfuse_v2"}),
        (GRID[2], {"_npu_paged_attention", "_npu_paged_attention_splitfuse_v2"}),
        (VERIFIES, {"_npu_paged_attention_splitfuse_v2"}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)  # fmt: skip
def test_which_kernel_serves_what(given, kernels):
    made = ascend_npu.stand_in()
    check(ROWS, given, made)
    found = {n.rpartition(".")[2] for n, _ in made.calls if "attention" in n}
    assert found == kernels


@pytest.mark.parametrize(
    "refused",
    [{"spec": {"dtype": "bfloat16"}}, {"spec": {"head_dim": 192}}, {"spec": {"head_dim": 72}}, {"spec": {"sinks": True}},
     {"spec": {"sliding_window": 8}}, {"spec": {"logit_softcap": 30.0}}, {"spec": {"attn_type": "encoder_only"}},
     {"spec": {"attn_type": "cross"}}, {"options": {"page_size": 64}}, {"options": {"lse": True}},
     {"options": {"kv_cache_dtype": "int8"}}, {"options": {"max_num_seqs": 2049}}, {"options": {"graph": "full"}},
     {"options": {"kv_layout": "NHD"}}, {"options": {"tree_mask": True}}],
    ids=str,
)  # fmt: skip
def test_what_is_not_claimed_is_refused(refused):
    given = case("", **refused)
    mine = (tuple(r for r in ROWS[0]), *ROWS[1:])
    with pytest.raises(NoBackendError), installed(ascend_npu.stand_in()):
        bound(mine, given)


def test_caches_are_made_in_the_fractal_format():
    with installed(ascend_npu.stand_in()):
        npu = importlib.import_module("torch_npu")
        group = bound(ROWS, GRID[0])
    cache = group.new_kv_cache(5)
    assert [tuple(t.shape) for t in cache.data] == [(5, 12, 128, 16)] * 2
    assert [npu.get_npu_format(t) for t in cache.data] == [29, 29]
    assert not any(t.any() for t in cache.data)


def cache_refusals() -> list[str]:
    """Wrapped caches that ATB would misread, and that were not refused."""
    with installed(ascend_npu.stand_in()):
        npu = importlib.import_module("torch_npu")
        group = bound(ROWS, GRID[0])
    made = make_step(group, GRID[0])
    pages = made.cache.num_pages

    def new(*shape: int, acl_format: int = 29) -> torch.Tensor:
        made = npu.empty_with_format([pages, *shape], dtype=torch.float16, device="cpu", acl_format=acl_format)
        return made.zero_()

    gaps = new(12, 128, 32)[..., :16]
    gaps.npu_format = 29
    found = []
    for what, t in (("plain", new(12, 128, 16, acl_format=2)), ("heads apart", new(3, 128, 64)), ("gaps", gaps)):
        for call in (lambda: made.run(), lambda: group.decode(made.q, None, None, made.cache, made.plan)):
            made.cache = wrap_kv_cache(t, t, layout="ASCEND_NZ", page_size=128)
            try:
                call()
                found.append(f"a cache was taken: {what}")
            except BadInputError as e:
                found += [] if "FRACTAL_NZ" in str(e) else [str(e)]
    return found


def test_caches_in_other_formats_are_refused():
    assert not cache_refusals()


def without_nnal() -> list[str]:
    """ATB's names exist without the library behind them; binding must find out, so that core can decide again."""
    try:
        with installed(ascend_npu.stand_in(nnal=False)):
            bound(ROWS, GRID[0])
    except MissingKernelError as e:
        return [] if "libatb.so" in str(e) else [str(e)]
    return ["bound without NNAL"]


def test_nnal_is_looked_for():
    assert not without_nnal()


def padding() -> list[str]:
    """Two rows of padding (slot -1) beside one real key, then the key read back."""
    with installed(ascend_npu.stand_in()):
        group = bound(ROWS, GRID[0])
    cache, table = group.new_kv_cache(3), torch.tensor([[1], [0], [0]], dtype=torch.int32)
    batch = Batch([1, 1, 1], [3, 1, 1], block_table=table, slot_mapping=torch.tensor([128 + 2, -1, -1]))
    k, v = (torch.randn(3, 3, 64).half() for _ in range(2))
    plan = group.plan(batch)
    group.write_kv(k, v, cache, plan)
    read = plain(3)(cache)
    found = ["the null page was written"] if any(t[0].any() for t in cache.data) else []
    if int(read.k.any((2, 3)).sum()) != 1 or not torch.equal(read.k[1, 2], k[0]):
        found.append("the key is not where it belongs")
    rows = Batch([1], [3], attn_type="encoder_only")
    chunk = ContextChunk(
        starts=torch.zeros(1, dtype=torch.int32), lens=torch.tensor([3], dtype=torch.int32), block_table=table[:1],
        page_size=128, batch=rows, plan=plan,
    )  # fmt: skip
    back = group.gather_kv(cache, plan, chunk)
    if not all(torch.equal(t, w[1, :3]) for t, w in zip(back, (read.k, read.v))):
        found.append("gather_kv does not read what was written")
    return found


def test_padding_and_reading_back():
    assert not padding()


IN_FLIGHT = [(ROWS, GRID[2]), (ROWS, GRID[5]), (ROWS, VERIFIES)]


def make():
    return [ascend_npu.stand_in()]


def test_isolation():
    check_isolation(IN_FLIGHT, make)


def two_devices() -> None:
    """Lengths of queries on the host, lengths of keys and pages on the device of the tensors."""
    check_two_devices([(ROWS, GRID[2]), (ROWS, VERIFIES)], make)


def test_two_devices():
    two_devices()


def everything() -> Iterator[Any]:
    yield without_nnal
    yield padding
    yield cache_refusals
    yield from attempts(ROWS, [*reversed(GRID)], make)
    yield two_devices
    yield lambda: replayed(GRID[0])
    yield lambda: replayed(VERIFIES)


MUTATIONS = [
    Mutation("scale of the width", ATB, '"scale_value": b.scale', '"scale_value": b.head_dim**-0.5'),
    Mutation("heads swapped", ATB, '{"num_heads": b.num_heads, "num_kv_heads": b.num_kv_heads',
             '{"num_heads": b.num_kv_heads, "num_kv_heads": b.num_heads'),
    Mutation("as many kv heads as heads", ATB, '"num_kv_heads": b.num_kv_heads', '"num_kv_heads": b.num_heads'),
    Mutation("mask upside down", ATB, "triu_(1)", "tril_(-1)"),
    Mutation("mask hides the diagonal", ATB, "triu_(1)", "triu_(0)"),
    Mutation("mask of ones", ATB, ".mul_(MASKED)", ""),
    Mutation("mask in the other direction", ATB, "MASKED = -10000.0", "MASKED = 10000.0"),
    Mutation("another type of mask", ATB, "NORM_COMPRESS = 5", "NORM_COMPRESS = 3"),
    Mutation("a small mask", ATB, "MASK_SIZE = 2048", "MASK_SIZE = 128"),
    Mutation("key lengths as queries", ATB, '["seq_len"] = batch.query_lens', '["seq_len"] = batch.kv_lens'),
    Mutation("cumulative queries", ATB, "= batch.query_lens\n", "= batch.cu_query_lens[1:]\n"),
    Mutation("queries on the device", ATB, "= batch.query_lens\n", "= batch.query_lens_device\n"),
    Mutation("keys on the host", ATB, '"context_lens": self.kv_lens', '"context_lens": batch.kv_lens'),
    Mutation("only cached keys", ATB, '"context_lens": self.kv_lens',
             '"context_lens": self.kv_lens - batch.query_lens_device'),
    Mutation("verify rows as single queries", ATB, 'b.role == "decode" and b.options.verify_width == 1',
             'b.role == "decode"'),
    Mutation("prompts as single queries", ATB, 'b.role == "decode" and b.options', "b.options"),
    Mutation("k and v swapped", ATB, "keys, values = pages", "values, keys = pages"),
    Mutation("pages of the batch in a graph", ATB, '"block_table": self.table', '"block_table": batch.block_table'),
    Mutation("no capture in the step", ATB, "Step(page_size, capture, always", "Step(page_size, None, always"),
    Mutation("padding rows with too few keys", ATB, "self.kv_lens.clamp_(min=self.capture.decode_width)", "pass"),
    Mutation("NNAL not looked for", NNAL, "        register()\n", "        pass\n"),
    Mutation("output never given", ATB, "out=out)", "out=out.clone())"),
    Mutation("plain caches", WRITE, '"acl_format": nz.FRACTAL_NZ', '"acl_format": 2'),
    Mutation("another format's number", NZ, "FRACTAL_NZ = 29", "FRACTAL_NZ = 2"),
    Mutation("format not looked at", NZ, " or format_of(t) != FRACTAL_NZ", ""),
    Mutation("gaps not looked at", NZ, " or not t.is_contiguous()", ""),
    Mutation("shape not looked at", NZ, "t.shape[1:] != shape or ", ""),
    Mutation("fractals of 8 columns", NZ, "COLUMNS = 16", "COLUMNS = 8"),
    Mutation("padding written to the null page", WRITE, "t[:n].where(step.written, 0)", "t[:n]"),
    Mutation("slot -1 written", WRITE, ".clamp(min=0)", ""),
    Mutation("64-bit slots", WRITE, ".to(torch.int32)", ""),
    Mutation("k read back as v", WRITE, "for t in pages(kv_cache))", "for t in pages(kv_cache)[::-1])"),
    Mutation("page and place swapped", WRITE, "t[page, :, place]", "t[place % 3, :, page]"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())
