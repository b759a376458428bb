"""Steps with unequal heads and tokens, bound through the resolver: what is tested here is what the rows promise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_core.backends import builtin, flex_attention, torch_native
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.domain import OneOf
from attn_core.resolve import resolve
from attn_core.runtime import Batch, BoundGroup, KVCache, Plan
from attn_core.runtime.backend import bind_decision
from attn_core.spec import AttentionSpec, BackendSpec, Device, EngineOptions, ModelSpec
from attn_core.testing import reference
from attn_core.testing.compare import differences

CPU = Device(platform="cpu", arch="avx512")
TABLES = {"torch_native": torch_native, "flex_attention": flex_attention}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLOPES = (0.5, 0.25, 0.125, 0.06, 0.03, 0.01)


def rows(backend: str) -> tuple[BackendSpec, ...]:
    return (*TABLES[backend].backends(CPU), *builtin.backends(CPU))


def bind(
    spec: AttentionSpec, backend: str = "torch_native", form: str | None = None, mla_query: str | None = None,
    **options: Any,
) -> BoundGroup:  # fmt: skip
    """Resolve among one backend's rows (of one MLA form, one layout of q) and bind. What the rows do not claim raises
    NoBackendError."""
    chosen = [r for r in rows(backend) if form is None or r.role != "prefill" or r.form == form]
    if mla_query is not None:
        narrow = OneOf(mla_query)
        chosen = [replace(r, accepts={**r.accepts, "mla_query": narrow}) if r.form else r for r in chosen]
    catalog = Catalog({str(CPU): DeviceCatalog(tuple(chosen))})
    installed = Installed({"torch": torch.__version__})
    decision = resolve(CPU, ModelSpec.of(spec), EngineOptions(**options), catalog, installed)
    (group,) = bind_decision(decision, "cpu").groups.values()
    return group


def spec(**fields: Any) -> AttentionSpec:
    """A small group with unequal heads: 6 query heads over 3 kv heads of width 16."""
    return AttentionSpec(**{"num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "dtype": "float32", **fields})


def mla_spec(**fields: Any) -> AttentionSpec:
    sizes = {"num_heads": 6, "nope_dim": 16, "rope_dim": 8, "head_dim": 24, "v_head_dim": 20, "latent_dim": 32}
    return AttentionSpec(**{"kind": "mla", "dtype": "float32", **sizes, **fields})


@dataclass(frozen=True)
class Lengths:
    """Query and kv length per sequence, decode rows first."""

    query: Sequence[int]
    kv: Sequence[int]


MIXED = Lengths((1, 1, 1, 5, 7, 4), (9, 1, 37, 5, 30, 4))
"""Three decode rows, a prefill without prefix, one with, and one more without."""


@dataclass
class Step:
    """One step of one layer with everything an engine would hold."""

    group: BoundGroup
    batch: Batch
    plan: Plan
    q: Any
    k: Tensor | None
    v: Tensor | None
    cache: KVCache | None
    extra: dict[str, Any] = field(default_factory=dict)
    """sinks, indices, bias as the model has them."""

    def run(self, **more: Any) -> Any:
        given = {**self.extra, **more}
        if "sinks" in given:
            given["sinks"] = self.group.prepare_sinks(given["sinks"])
        return self.group.forward(self.q, self.k, self.v, self.cache, self.plan, **given)

    def want(self) -> tuple[Tensor, Tensor]:
        k, v = (None, None) if self.cache is not None else (self.k, self.v)
        return reference.attention(
            self.group.spec, self.batch, self.q, k, v, self.cache, scale=self.group.scale, **self.extra
        )

    def check(self, *, lse: bool = True, ulps: float = 2.0) -> Any:
        """Run (the cache is written on the way), then compare output and lse with the reference; returns the output."""
        got = self.run(return_lse=lse)
        o, sums = got if lse else (got, None)
        want, want_sums = self.want()
        found = differences(o, want, o.dtype, lse=sums, want_lse=want_sums if lse else None, ulps=ulps)
        assert not found, found
        return o

    def check_gaps(self) -> None:
        """An ``out=`` with gaps gets what one without gets, and nothing between its rows."""
        want = self.check()
        wide = want.new_full((want.shape[0], 2 * want.shape[1], want.shape[2]), 7.0)
        out = wide[:, : want.shape[1]]
        assert self.run(out=out) is out
        assert torch.equal(out, want)
        assert bool((wide[:, want.shape[1] :] == 7.0).all())


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def gapped(t: Tensor, axis: int = 1) -> Tensor:
    """The same numbers as part of a wider tensor, as an engine splits a projection's output. Between the parts is NaN.

    ``axis``: the first of those that lie closely packed; 1 leaves gaps between rows, 2 also between heads.
    """
    *outer, inner = t.flatten(axis).shape
    wide = t.new_full((*outer, 2 * inner), float("nan"))
    wide[..., :inner] = t.flatten(axis)
    return wide[..., :inner].unflatten(-1, t.shape[axis:])


def table(lengths: Sequence[int], page_size: int, generator: torch.Generator, spare: int = 1) -> tuple[Tensor, int]:
    """A block table of shuffled pages, none twice and never page 0, and how many pages the cache needs."""
    counts = [-(-n // page_size) for n in lengths]
    ids = (torch.randperm(sum(counts), generator=generator) + 1).to(torch.int32)
    out = torch.zeros(len(lengths), max(counts) + spare, dtype=torch.int32)
    for row, (count, part) in enumerate(zip(counts, ids.split(counts))):
        out[row, :count] = part
    return out, sum(counts) + 1


def slots(block_table: Tensor, query: Iterable[int], kv: Iterable[int], page_size: int) -> Tensor:
    """Slots of the new tokens, which are the last of each sequence."""
    found = []
    for row, (n, m) in enumerate(zip(query, kv)):
        position = torch.arange(m - n, m)
        found.append(block_table[row][position // page_size].long() * page_size + position % page_size)
    return torch.cat(found)


def fill(cache: KVCache, generator: torch.Generator) -> None:
    """Random contents everywhere but in the null page, as a run of earlier steps would have left them."""
    for t in cache.data:
        if t.dtype == torch.int8:
            t[1:] = torch.randint(-90, 91, t[1:].shape, generator=generator, dtype=torch.int8)
        else:
            t[1:] = torch.randn(t[1:].shape, generator=generator).to(t.dtype)


def extras(s: AttentionSpec, lengths: Lengths, generator: torch.Generator) -> dict[str, Any]:
    """What the model has beside q, k and v: sinks, a bias per sequence, indices (one query with none)."""
    found: dict[str, Any] = {}
    if s.sinks:
        found["sinks"] = torch.randn(s.num_heads, generator=generator)
    if s.bias:
        shape = (len(lengths.query), s.num_heads, max(lengths.query), max(lengths.kv) + 2)
        found["bias"] = torch.randn(shape, generator=generator)
    if s.topk:
        found["indices"] = torch.full((sum(lengths.query), s.topk), -1, dtype=torch.int32)
        positions = [p for n, m in zip(lengths.query, lengths.kv) for p in range(m - n, m)]
        for row, p in enumerate(positions):
            chosen = torch.randperm(p + 1, generator=generator)[: s.topk].int()
            if row != 2:
                found["indices"][row, : len(chosen)] = chosen
    return found


def step(group: BoundGroup, lengths: Lengths = MIXED, *, seed: int = 0, scales: tuple[Any, Any] = (1.0, 1.0),
         bounds: Sequence[int] | None = None, **batch_fields: Any) -> Step:  # fmt: skip
    """A decoder or absorbed-MLA step: cached context, new tokens to write, pages in random order.

    ``bounds``: what the host believes the kv lengths to be at most.
    """
    g = torch.Generator().manual_seed(seed)
    s, p = group.spec, group.page_size or 1
    dtype = DTYPES[s.dtype]
    block_table, pages = table(lengths.kv if bounds is None else bounds, p, g)
    cache = group.new_kv_cache(pages, k_scale=scales[0], v_scale=scales[1])
    fill(cache, g)
    tokens = sum(lengths.query)
    if s.kind == "mla":
        parts = [random(g, dtype, tokens, s.num_heads, w) for w in (s.latent_dim or 0, s.rope_dim or 0)]
        q: Any = [gapped(part, 2) for part in (parts if group.mla_query == "split" else [torch.cat(parts, -1)])]
        k, v = random(g, dtype, tokens, s.latent_dim or 0), random(g, dtype, tokens, s.rope_dim or 0)
    else:
        several = 1 if s.dual_chunk is None else 3
        q = [gapped(random(g, dtype, tokens, s.num_heads, s.head_dim), 2) for _ in range(several)]
        k = random(g, dtype, tokens, s.num_kv_heads, s.head_dim)
        v = random(g, dtype, tokens, s.num_kv_heads, s.v_head_dim)
    if bounds is not None:
        batch_fields.update(exact=False, kv_lens_device=torch.tensor(lengths.kv, dtype=torch.int32))
    batch = Batch(
        list(lengths.query), list(lengths.kv if bounds is None else bounds), block_table=block_table,
        slot_mapping=slots(block_table, lengths.query, lengths.kv, p), **batch_fields,
    )  # fmt: skip
    q = q[0] if len(q) == 1 else tuple(q)
    return Step(
        group, batch, group.plan(batch), q, gapped(k, k.dim() - 1), gapped(v, v.dim() - 1), cache, extras(s, lengths, g)
    )


def encode_step(group: BoundGroup, lengths: Lengths, *, seed: int = 0) -> Step:
    g = torch.Generator().manual_seed(seed)
    s, dtype = group.spec, DTYPES[group.spec.dtype]
    q = random(g, dtype, sum(lengths.query), s.num_heads, s.head_dim)
    k = random(g, dtype, sum(lengths.kv), s.num_kv_heads, s.head_dim)
    v = random(g, dtype, sum(lengths.kv), s.num_kv_heads, s.v_head_dim)
    batch = Batch(list(lengths.query), list(lengths.kv), attn_type="encoder_only")
    return Step(group, batch, group.plan(batch), gapped(q, 2), gapped(k, 2), gapped(v, 2), None, extras(s, lengths, g))


def cross_step(group: BoundGroup, lengths: Lengths, *, seed: int = 0) -> Step:
    """Cross attention after the first step: the encoder's keys are in the cache, nothing is written."""
    g = torch.Generator().manual_seed(seed)
    s, p, dtype = group.spec, group.page_size or 1, DTYPES[group.spec.dtype]
    block_table, pages = table(lengths.kv, p, g)
    cache = group.new_kv_cache(pages)
    fill(cache, g)
    batch = Batch(list(lengths.query), list(lengths.kv), block_table=block_table, attn_type="cross")
    q = random(g, dtype, sum(lengths.query), s.num_heads, s.head_dim)
    return Step(group, batch, group.plan(batch), gapped(q, 2), None, None, cache, extras(s, lengths, g))
