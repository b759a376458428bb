"""Kernels made of a few lines of torch, and choices that bind them: what the runtime tests run on.

Everything is computed in float64, one sequence at a time, from the batch alone.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from attn_core.runtime import Batch, Binding, BoundGroup, Kernels, bind_group
from attn_core.spec import AttentionSpec, Device, EngineOptions

CPU = Device(platform="cpu", arch="generic")
PAGE = 4


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A choice, as the resolver would make it."""

    backend: str = "simple"
    bind: str | None = "simple_kernels:bind"
    form: str | None = None
    unified: bool = False
    head_dim: int | None = None
    num_heads: int | None = None
    claims: frozenset[str] = frozenset()


NATIVE = frozenset({"native_out", "strided_out"})
BOUND: list[Binding] = []
"""Every binding seen since a test cleared it."""


_numbers = itertools.count()


def install(bind: Callable[[Binding], Any]) -> str:
    """Make a function importable and return its bind string."""
    name = f"bind_{next(_numbers)}"
    setattr(sys.modules[__name__], name, bind)
    return f"{__name__}:{name}"


def group(spec: AttentionSpec, *, values: dict[str, Any] | None = None, options: dict[str, Any] | None = None,
          name: str = "full", **picks: Any) -> BoundGroup:  # fmt: skip
    """Bind a group; every role it has gets a plain Pick unless one is given as a keyword."""
    settled: dict[str, Any] = {"graph": "none", "scale": spec.softmax_scale}
    if spec.cached:
        layout = "MLA" if spec.kind == "mla" else "NHD"
        settled |= {"page_size": PAGE, "kv_cache_dtype": spec.dtype, "kv_layout": layout}
    choices = {role: picks.get(role, Pick(claims=NATIVE)) for role in spec.roles}
    choices = {role: pick for role, pick in choices.items() if pick is not None}
    return bind_group(
        name, spec, choices, settled | (values or {}), EngineOptions(**(options or {})), CPU, torch.device("cpu")
    )


def spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32", **changes})


def paged(query_lens: list[int], kv_lens: list[int], *, page_size: int = PAGE, seed: int = 0, **rest: Any) -> Batch:
    """A batch with pages handed out at random from page 1 on, and slots for its new tokens."""
    counts = [-(-n // page_size) for n in kv_lens]
    ids = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1).to(torch.int32)
    table = torch.zeros(len(kv_lens), max(counts) + 1, dtype=torch.int32)
    for row, (pages, count) in enumerate(zip(ids.split(counts), counts)):
        table[row, :count] = pages
    slots = [
        int(table[row, p // page_size]) * page_size + p % page_size
        for row, (q, kv) in enumerate(zip(query_lens, kv_lens))
        for p in range(kv - q, kv)
    ]
    rest = {"slot_mapping": torch.tensor(slots, dtype=torch.int64), **rest}
    return Batch(query_lens, kv_lens, block_table=table, **rest)


def pages_of(batch: Batch) -> int:
    """Cache pages a batch made by ``paged`` needs, the null page included."""
    assert batch.block_table is not None
    return int(batch.block_table.max()) + 1


def dense(q: Any, k: Any, v: Any, scale: float, visible: Any, sinks: Any = None, slopes: Any = None) -> Any:
    """Attention of one sequence in float64: ``(tokens, heads, width)`` against ``(keys, kv heads, width)``."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if slopes is not None:
        n, m = visible.shape
        distance = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
        scores = scores + torch.tensor(slopes).double()[:, None, None] * distance
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, column), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.nan_to_num(torch.exp(scores - lse[..., None]))[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T


def causal(num_queries: int, num_keys: int) -> torch.Tensor:
    return torch.arange(num_keys) <= torch.arange(num_queries)[:, None] + num_keys - num_queries


def sequences(batch: Batch) -> list[tuple[slice, slice, int, int]]:
    """(queries, ragged keys, query length, key length) of every sequence."""
    q, k = batch.cu_query_lens.tolist(), batch.cu_kv_lens.tolist()
    return [(slice(a, b), slice(c, d), b - a, d - c) for a, b, c, d in zip(q, q[1:], k, k[1:])]


@dataclass
class Planned:
    """What a simple kernel's plan makes; ``fills`` counts how often it was refilled."""

    batch: Batch
    capture: Any
    fills: int = 1
    calls: list[SimpleNamespace] = field(default_factory=list)


def bind(b: Binding) -> Kernels:
    """Attention of any role over NHD pages, MLA rows or ragged keys; honours sizes it is given, never pads."""
    BOUND.append(b)

    def plan(batch: Batch, *, capture: Any = None, out: Planned | None = None) -> Planned:
        if out is None:
            return Planned(batch, capture)
        out.batch, out.fills = batch, out.fills + 1
        return out

    def rows(kv_cache: Any) -> tuple[Any, Any]:
        if b.kv_layout == "NHD":
            return kv_cache.data[0].flatten(0, 1), kv_cache.data[1].flatten(0, 1)
        row = kv_cache.data[0].flatten(0, 1)[:, None]
        return row, row[..., : b.v_head_dim]

    def call(q, k, v, kv_cache, plan, *, sinks=None, indices=None, bias=None, out=None, return_lse=False):  # type: ignore[no-untyped-def]
        mine = getattr(plan, b.role)
        mine.calls.append(SimpleNamespace(q=q, k=k, v=v, sinks=sinks, indices=indices, bias=bias, out=out))
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        assert q.shape[1:] == (b.num_heads, b.head_dim)
        ragged = b.role == "encode" or b.form == "materialised"
        if not ragged:
            k, v = (x[mine.batch.token_indices(b.page_size)] for x in rows(kv_cache))
        assert (k.shape[1:], v.shape[1:]) == ((b.num_kv_heads, b.head_dim), (b.num_kv_heads, b.v_head_dim))
        result = out if out is not None else q.new_empty(*q.shape[:2], b.v_head_dim)
        lse = torch.empty(q.shape[:2])
        for queries, keys, n, m in sequences(mine.batch):
            visible = causal(n, m) if b.spec.causal else torch.ones(n, m, dtype=torch.bool)
            o, row_lse = dense(q[queries], k[keys], v[keys], b.scale, visible, sinks, b.alibi_slopes)
            result[queries], lse[queries] = o.to(result.dtype), row_lse.float()
        return (result, lse) if return_lse else result

    def write(k, v, kv_cache, plan):  # type: ignore[no-untyped-def]
        slots = plan.write.batch.slot_mapping
        k, v = k[slots >= 0], v[slots >= 0]
        slots = slots[slots >= 0]
        if b.kv_layout == "NHD":
            rows(kv_cache)[0][slots], rows(kv_cache)[1][slots] = k, v
        else:
            kv_cache.data[0].flatten(0, 1)[slots] = torch.cat((k, v), dim=-1)

    def gather(kv_cache, plan, chunk):  # type: ignore[no-untyped-def]
        if b.kv_layout == "NHD":
            return tuple(x[chunk.slots] for x in rows(kv_cache))
        row = kv_cache.data[0].flatten(0, 1)[chunk.slots]
        return row.split((b.spec.latent_dim, b.spec.rope_dim), dim=-1)

    if b.role == "kv_write":
        return Kernels(plan, write, gather=gather)
    return Kernels(plan, call)
