"""Kernels that are a little wrong are noticed: each mutant changes one line and must fail where the original passes."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from kernel_cases import SLOPES, Lengths, cross_step, encode_step, mla_spec, spec, step
from triton_cases import SM75, SMALL, bind, tiled

from attn_core.backends.triton import attend, kv_write, launch, pages, schedule

STEPS = Lengths((1, 1, 9), (70, 3, 41))
VERIFY = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()


def decoder(**fields) -> None:
    step(bind(spec(**fields), lse=True, page_size=8), STEPS).check()


def alibi() -> None:
    decoder(alibi_slopes=SLOPES)


def quantised() -> None:
    group = bind(spec(), lse=True, page_size=8, kv_cache_dtype="int8")
    step(group, STEPS, scales=(0.02, 0.03)).check()


def encoder() -> None:
    encode_step(bind(spec(attn_type="encoder_only", sliding_window=9), lse=True), Lengths((5, 30), (21, 7))).check()


def cross() -> None:
    cross_step(bind(spec(attn_type="cross"), lse=True, page_size=4), Lengths((1, 5), (7, 40))).check()


def tree() -> None:
    group = bind(spec(), lse=True, page_size=8, verify_width=3, tree_mask=True)
    step(group, Lengths((3, 3), (40, 3)), decode_width=3, tree_mask=VERIFY.expand(2, 3, 3)).check()


def spans() -> None:
    group = bind(spec(bidirectional_prefix=True), lse=True, page_size=4)
    step(group, Lengths((1, 12, 27), (9, 12, 40)), bidirectional_spans=[[], [(3, 9)], [(14, 19), (22, 40)]]).check()


def latent() -> None:
    step(bind(mla_spec(), form="absorbed", lse=True, page_size=8), STEPS).check()


def halves() -> None:
    s = mla_spec(nope_dim=16, rope_dim=64, head_dim=80, v_head_dim=16, latent_dim=512)
    step(bind(s, form="absorbed", device=SM75, lse=True, page_size=8), Lengths((1,), (37,))).check()


def sparse() -> None:
    group = bind(mla_spec(sparse="dsa", topk=21), form="absorbed", lse=True, page_size=4)
    s = step(group, Lengths((1, 5), (36, 30)))
    s.extra["indices"][:, -1] = 35
    s.extra["indices"][0, -1] = -1
    s.check()


def null_page() -> None:
    s = step(bind(spec(), page_size=4), Lengths((3,), (9,)))
    s.batch.slot_mapping[:] = torch.tensor([-1, 2, 5])
    s.group.write_kv(s.k, s.v, s.cache, s.plan)
    assert not s.cache.k[0].any()


@dataclass(frozen=True)
class Mutant:
    module: ModuleType
    old: str
    new: str
    noticed_by: Callable[[], None]


MUTANTS = {
    "window one too long": Mutant(
        attend, "position - WINDOW + 1", "position - WINDOW", lambda: decoder(sliding_window=7)
    ),
    "two-sided window one too long": Mutant(
        attend, "(end, position + WINDOW)", "(end, position + WINDOW + 1)", encoder
    ),
    "causality one late": Mutant(attend, "tl.minimum(end, position + 1)", "tl.minimum(end, position + 2)", decoder),
    "chunk one late": Mutant(
        attend, "start = position // CHUNK", "start = (position + 1) // CHUNK", lambda: decoder(attention_chunk=8)
    ),
    "sinks not in the denominator": Mutant(
        attend, "norm = norm * weight + tl.exp2(sink - top)", "norm = norm * weight", lambda: decoder(sinks=True)
    ),
    "lse in base 2": Mutant(attend, "(m + tl.log2(total)) * LN2", "m + tl.log2(total)", decoder),
    "last split lost": Mutant(attend, "range(first, first + count)", "range(first, first + count - 1)", decoder),
    "splits joined unscaled": Mutant(
        attend, "acc = acc * shrink[:, None] + o * p[:, None]", "acc = acc + o * p[:, None]", decoder
    ),
    "sums not rescaled": Mutant(attend, "norm = norm * shrink + tl.sum(p, 1)", "norm = norm + tl.sum(p, 1)", decoder),
    "accumulator not rescaled": Mutant(attend, "v_main, acc * shrink[:, None],", "v_main, acc,", decoder),
    "scale of the padded width": Mutant(
        attend, "factor = scale\n", "factor = 1.0 / tl.sqrt((MAIN + REST) * 1.0)\n", lambda: decoder(head_dim=24)
    ),
    "rest of the width dropped": Mutant(attend, "if REST:\n        k_more", "if REST < 0:\n        k_more", latent),
    "first half of the keys twice": Mutant(attend, "load_keys(k + MAIN, page", "load_keys(k, page", halves),
    "first half of q twice": Mutant(attend, "q_at[:, None] + MAIN + tl", "q_at[:, None] + tl", halves),
    "first half of v twice": Mutant(attend, "load_keys(v + V_MAIN, page", "load_keys(v, page", halves),
    "scale of k dropped": Mutant(attend, "factor * tl.load(k_scale + kv_head * k_scale_head)", "factor", quantised),
    "scale of v dropped": Mutant(attend, "weight * tl.load(v_scale + kv_head * v_scale_head)", "weight", quantised),
    "heads interleaved": Mutant(
        attend, "kv_head * GROUP + rows % GROUP", "rows % GROUP * HEADS_KV + kv_head", decoder
    ),
    "one page per block of keys": Mutant(attend, "pages + at // PAGE", "pages + n // PAGE + at * 0", decoder),
    "softcap of half the slope": Mutant(
        attend, "(2.0 / SOFTCAP)", "(1.0 / SOFTCAP)", lambda: decoder(logit_softcap=3.0)
    ),
    "alibi with the wrong sign": Mutant(attend, "x - slope[:, None]", "x + slope[:, None]", alibi),
    "alibi of the absolute key": Mutant(
        attend, "key[None, :] - position[:, None]", "key[None, :] - position[:, None] * 0", alibi
    ),
    "last block unmasked": Mutant(attend, "n + BLOCK_N > clear", "n > clear", cross),
    "tree ignored": Mutant(attend, "shown != 0, seen)", "seen, seen)", tree),
    "spans ignored": Mutant(attend, "seen = seen | ((key", "seen = seen & ((key", spans),
    "rows without keys divided by zero": Mutant(attend, "blind = norm == 0", "blind = norm < 0", encoder),
    "indices see the future": Mutant(
        attend, "seen = key[None, :] < end[:, None]", "seen = key[None, :] < NOWHERE + end[:, None] * 0", sparse
    ),
    "missing indices read as key 0": Mutant(attend, "(key < high) & (at >= 0)", "key < high", sparse),
    "pieces one key short": Mutant(schedule, "begin + size[tile], partial", "begin + size[tile] - 1, partial", decoder),
    "second piece twice": Mutant(
        schedule, "begin = number * size[tile]", "begin = number.clamp(max=1) * size[tile]", decoder
    ),
    "null page written": Mutant(pages, "if slot < PAGE:", "if slot < 0:", null_page),
    "integers cut off, not rounded": Mutant(pages, "x + TO_INTEGER - TO_INTEGER", "x", quantised),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name, tmp_path, monkeypatch):
    mutant = MUTANTS[name]
    source = inspect.getsource(mutant.module)
    assert source.count(mutant.old) >= 1, "the line to change is gone: write the mutant anew"
    wrong = _load(source.replace(mutant.old, mutant.new), tmp_path, monkeypatch)
    for user in (launch, kv_write):
        for key in ("attend", "merge", "schedule", "write", "gather"):
            if hasattr(wrong, key) and hasattr(user, key):
                monkeypatch.setattr(user, key, getattr(wrong, key))
    if mutant.module is schedule:
        monkeypatch.setattr(wrong, "FEWEST_KEYS", 32)
    with tiled(SMALL, fewest_keys=32):
        if name == "integers cut off, not rounded":  # the reference reads what was written, so compare what is stored
            s = step(bind(spec(), page_size=8, kv_cache_dtype="int8"), STEPS, scales=(0.02, 0.03))
            s.group.write_kv(s.k, s.v, s.cache, s.plan)
            stored = s.cache.k.flatten(0, 1)[s.batch.slot_mapping].float()
            assert not torch.equal(stored, (s.k / 0.02).round())
            return
        with pytest.raises(AssertionError):
            mutant.noticed_by()


def test_the_scenarios_pass_with_the_kernels_as_they_are():
    with tiled(SMALL, fewest_keys=32):
        for scenario in {m.noticed_by for m in MUTANTS.values()}:
            scenario()


def _load(source: str, folder, monkeypatch) -> ModuleType:
    path = folder / "mutant.py"
    path.write_text(source)
    found = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "mutant", module)
    found.loader.exec_module(module)
    return module
