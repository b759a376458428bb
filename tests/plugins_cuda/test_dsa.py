"""The dsa adapter against its stand-in: two kinds of cache, the kernel chosen per step, the writer of the fp8 rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_core.runtime import Capture, wrap_kv_cache
from attn_core.testing import reference
from attn_core.testing.compare import differences
from attn_plugin_cuda.kernels import dsa_rows
from numerics.kernel_cases import step
from simulators import cuda_flash_mla
from simulators.harness import DECODE, VERIFY, Case, Lengths, attempts, bound, caught, check, device, mutations, rows_of
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

ROWS = rows_of("cuda", device("cuda", "sm_90"), "dsa")
KERNELS = "attn_plugin_cuda.kernels"
SPEC = {"kind": "mla", "sparse": "dsa", "topk": 128, "num_heads": 64}
MIXED = Lengths((1, 1, 5, 9), (200, 9, 5, 150))
LONG = Lengths((1, 1), (700, 900))
"""More than 512 keys a query."""

PLAIN = {"kv_layout": "MLA"}
"""The bfloat16 cache; otherwise the fp8 one is taken."""


def case(name, spec=None, options=None, **fields):
    return Case(name=name, spec={**SPEC, **(spec or {})}, options={**PLAIN, **(options or {})}, **fields)


GRID = [
    case("mixed", lengths=MIXED),
    case("decode", lengths=DECODE),
    case("padded heads", {"num_heads": 6}, lengths=DECODE),
    case("128 heads", {"num_heads": 128}, lengths=Lengths((1,), (30,))),
    case("scale", {"scale": 0.1}, lengths=DECODE),
    case("256 indices", {"topk": 256}, lengths=Lengths((1, 3), (400, 300))),
    case("verify", lengths=VERIFY, options={"verify_width": 3}, batch={"decode_width": 3}),
    case("no lse", lengths=DECODE, lse=False),
]


def make():
    return cuda_flash_mla.stand_ins()


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_bfloat16_cache(case):
    check(ROWS, case, *make())


def random_rows(count, seed):
    """Bytes of cache rows without NaN, in scales that differ between blocks."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randn(count, 4, 128, generator=g) * torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None]
    return dsa_rows.encode(blocks.flatten(1), torch.randn(count, 64, generator=g))


def fp8_group(**more):
    case = Case(name="", spec=SPEC, options={"kv_cache_dtype": "fp8_e4m3", **more})
    with installed(*make()):
        return bound(ROWS, case)


def wrong_fp8(lengths=MIXED, *, group=None, unseen=False, capture=None, plan=None, seed=0, **batch):
    """What is wrong with a step over the fp8 cache, by the reference on the numbers that the cache holds."""
    group = group or fp8_group(verify_width=batch.get("decode_width", 1))
    made = step(group, lengths, seed=seed, **batch)
    made.cache.data[0][1:] = random_rows((made.cache.num_pages - 1) * 64, seed).view(-1, 64, 656)
    if unseen:  # positions that only later tokens may see
        made.extra["indices"][1:, -1] = lengths.kv[0] - 1
    if capture is not None or plan is not None:
        made.plan = group.plan(made.batch, capture=capture) if plan is None else group.plan(made.batch, out=plan)
    out, lse = made.run(return_lse=True)
    numbers = cuda_flash_mla.dequantised(made.cache.data[0].flatten(0, 1)).bfloat16().float().unflatten(0, (-1, 64))
    asked = {**made.extra, "indices": made.extra["indices"]}
    want, want_lse = reference.attention(
        group.spec, made.batch, made.q, kv_cache=wrap_kv_cache(numbers, layout="MLA"), scale=group.scale, **asked
    )
    return differences(out, want, out.dtype, lse=lse, want_lse=want_lse, ulps=4), made


CASES = {
    "few keys a query": {"lengths": MIXED},
    "many keys a query": {"lengths": LONG},
    "both": {"lengths": Lengths((1, 9), (800, 150))},
    "keys not to be seen yet": {"lengths": MIXED, "unseen": True},
    "verify": {"lengths": VERIFY, "decode_width": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_fp8_cache(name):
    found, _ = wrong_fp8(**CASES[name])
    assert not found


def test_the_plan_takes_the_kernel():
    for lengths, kernel in ((MIXED, "flashmla_sparse"), (LONG, "flashmla_kv"), (Lengths((1,), (512,)), "flashmla_kv")):
        _, made = wrong_fp8(lengths)
        assert made.plan.decode.run.__name__ == kernel


def captured():
    """A captured plan keeps one kernel and its addresses, whatever the lengths."""
    group = fp8_group(graph="decode")
    first = Lengths((1,) * 3, (9, 200, 70))
    found, made = wrong_fp8(first, group=group, capture=Capture(max_seqs=3, decode_width=1, max_kv_len=1000))
    plan = made.plan
    before = [plan.decode.table.data_ptr(), plan.decode.last.data_ptr(), plan.write.slots.data_ptr()]
    more, made = wrong_fp8(Lengths((1,) * 3, (90, 3, 800)), group=group, plan=plan, seed=1)
    after = [plan.decode.table.data_ptr(), plan.decode.last.data_ptr(), plan.write.slots.data_ptr()]
    kernel = plan.decode.run.__name__
    return [*found, *more, *([] if before == after and kernel == "flashmla_kv" else [f"addresses or {kernel} changed"])]


def test_captured():
    assert captured() == []


def test_rows_hold_what_was_written():
    g = torch.Generator().manual_seed(0)
    latent, rope = torch.randn(7, 512, generator=g).bfloat16(), torch.randn(7, 64, generator=g).bfloat16()
    rows = dsa_rows.encode(latent, rope)
    assert rows.shape == (7, 656)
    numbers = cuda_flash_mla.dequantised(rows)
    assert torch.equal(numbers[:, 512:], rope.double())
    assert ((numbers[:, :512] - latent.double()).abs() <= latent.double().abs() / 16 + 1e-2).all()
    assert torch.allclose(dsa_rows.decode(rows, torch.float32).double(), numbers)
    assert not dsa_rows.decode(dsa_rows.encode(latent * 0, rope * 0), torch.float32).any()


def test_padding_tokens_write_nothing():
    group = fp8_group()
    made = step(group, Lengths((1, 1), (5, 9)))
    made.cache.data[0].zero_()
    batch = made.batch.with_pages(made.batch.block_table, torch.tensor([-1, -1]))
    group.write_kv(made.k, made.v, made.cache, group.plan(batch))
    rows = made.cache.data[0].clone()
    rows[0] = 0
    assert not rows.any()
    assert not dsa_rows.decode(made.cache.data[0][0], torch.float32).any()


MUTATIONS = [
    *mutations(f"{KERNELS}.dsa", {
        "scale dropped in kv": ("step.schedule, softmax_scale=scale,", "step.schedule,"),
        "positions for slots": ("page * page_size + indices % page_size", "indices"),
        "places of the wrong page size": ("indices % page_size", "indices % (page_size - 1)"),
        "causality left to the kernel": (" & (indices <= self.last)", ""),
        "own key not seen": ("indices <= self.last", "indices < self.last"),
        "sequences not told apart": ("self.first + indices", "indices"),
        "plus infinity left": ("lse.masked_fill(lse == math.inf, -math.inf)", "lse"),
        "the wrong kernel": ("< KEYS_PER_QUERY *", "> KEYS_PER_QUERY * 0 *"),
        "the current kernels": ("d_v=latent, use_legacy=True", "d_v=latent", 2),
        "gathered under capture": ("capture is None and sum", "sum"),
        "tables of the first step": ("        self.table[:, :width].copy_(table[:, :width])\n", ""),
        "last keys of the first step": ("        self.last.copy_(last)\n", ""),
        "fixed table": ("            self.table, self.last = table, last\n", "            self.table, self.last = table.flip(0), last\n"),
    }),
    *mutations(f"{KERNELS}.dsa_rows", {
        "scales of the whole row": ("blocks.abs().amax(-1)", "blocks.abs().amax((-1, -2), keepdim=True)[..., 0].expand(-1, 4) * 0 + 1"),
        "rotary part in float16": ("rope.to(torch.bfloat16).contiguous()", "rope.to(torch.float16).contiguous()"),
        "parts in another order": ("(values, scales, rope", "(scales, values, rope"),
        "blocks of another size": ("ROW_BYTES, LATENT, BLOCK = 656, 512, 128", "ROW_BYTES, LATENT, BLOCK = 656, 512, 64"),
    }),
]  # fmt: skip


def writing():
    """The writer's rows as FlashMLA reads them; modules as they are now, mutated or not."""
    from attn_plugin_cuda.kernels import dsa_rows as rows

    latent, rope = torch.randn(5, 512) * 3, torch.randn(5, 64).bfloat16()
    numbers = cuda_flash_mla.dequantised(rows.encode(latent, rope))
    near = (numbers[:, :512] - latent.double()).abs() <= latent.double().abs() / 16 + 5e-3
    return [] if near.all() and torch.equal(numbers[:, 512:], rope.double()) else ["rows differ"]


def everything():
    yield writing
    yield from attempts(ROWS, GRID[:3], make)
    for case in CASES.values():
        yield lambda case=case: wrong_fp8(**case)[0]
    yield captured
    yield kernels


def kernels():
    _, few = wrong_fp8(MIXED)
    _, many = wrong_fp8(LONG)
    names = (few.plan.decode.run.__name__, many.plan.decode.run.__name__)
    return [] if names == ("flashmla_sparse", "flashmla_kv") else [f"kernels {names}"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())


IN_FLIGHT = [(ROWS, replace(c, lengths=MIXED)) for c in GRID if c.name in ("mixed", "padded heads", "scale")]


def test_groups_and_batches_in_flight_do_not_meet():
    check_isolation(IN_FLIGHT, make)


def test_two_devices():
    check_two_devices(IN_FLIGHT, make)
