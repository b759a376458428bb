"""One shape bound to one backend: its cache filled, its step planned, its call ready to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.bench.inputs import Inputs
from attn_core.bench.shapes import Shape
from attn_core.platform import Platform
from attn_core.runtime import Batch, BoundGroup, KVCache, Plan


@dataclass(frozen=True)
class Case:
    """``call()`` attends once and returns the packed output; ``replan()`` refills the step's plan in place."""

    shape: Shape
    group: BoundGroup
    digest: str
    inputs: Inputs
    absorbed: bool
    call: Callable[[], Tensor]
    replan: Callable[[], Plan]

    @property
    def kv_bytes(self) -> int:
        """Bytes per cached element as stored; without a cache those of k itself."""
        stored = self.group.kv_dtype if self.reads_cache else None
        return (stored or self.inputs.k.dtype).itemsize

    @property
    def reads_cache(self) -> bool:
        return self.group.spec.cached and not (self.group.materialised and self.shape.role == "prefill")


def candidates(platform: Platform, role: str) -> tuple[str, ...]:
    """Backends that some plugin declares for this device in this role, by name."""
    rows = platform.catalog.devices[str(platform.device)].backends
    return tuple(sorted({r.backend for r in rows if r.role == role}))


def build(platform: Platform, shape: Shape, backend: str, *, kv_cache_dtype: str | None = None) -> Case:
    """Bind ``backend`` for the timed role; the other roles are free.

    Raises :class:`NoBackendError` with the reasons when the backend does not serve the shape, :class:`BindError` when
    it is declared without kernels.
    """
    role = shape.role
    pins: dict[str, Any] = {"backend" if role == "encode" or shape.kind == "mixed" else f"{role}_backend": backend}
    if kv_cache_dtype is not None and shape.spec.cached:
        pins["kv_cache_dtype"] = kv_cache_dtype
    attn = platform.attention_backend(shape.spec, allow_reference=True, **pins)
    (group,) = attn.groups.values()
    absorbed = group.bindings[role].form == "absorbed"
    inputs = Inputs.make(shape, absorbed, group.torch_device)
    batch, cache = _step(group, shape, inputs, absorbed)
    plan = group.plan(batch)
    call = _call(group, shape, inputs, cache, plan)
    return Case(
        shape=shape, group=group, digest=attn.decision.digest, inputs=inputs, absorbed=absorbed, call=call,
        replan=lambda: group.plan(batch, out=plan),
    )  # fmt: skip


def _step(group: BoundGroup, shape: Shape, inputs: Inputs, absorbed: bool) -> tuple[Batch, KVCache | None]:
    """The step's batch, and its cache with all keys written by the backend's own writer, pages in random order."""
    query, kv = list(shape.query_lens), list(shape.kv_lens)
    if not group.spec.cached:
        return Batch(query, kv, attn_type=group.spec.attn_type, device=group.torch_device), None
    page = group.page_size or 1
    counts = [-(-n // page) for n in kv]
    generator = torch.Generator().manual_seed(1)
    ids = torch.split((torch.randperm(sum(counts), generator=generator) + 1).int(), counts)
    table = torch.zeros(len(kv), max(counts), dtype=torch.int32)
    for row, part in zip(table, ids):
        row[: len(part)] = part
    slots = [
        row.long()[torch.arange(n) // page] * page + torch.arange(n) % page for row, n in zip(table, kv)
    ]  # every key of every sequence
    new = [s[m - n :] for s, n, m in zip(slots, query, kv)]
    table = table.to(group.torch_device)
    writes = shape.kind == "mixed"  # a whole step writes its keys; else they are there already
    batch = Batch(query, kv, block_table=table, slot_mapping=torch.cat(new).to(group.torch_device) if writes else None)
    cache = group.new_kv_cache(sum(counts) + 1)
    if absorbed or not group.materialised:
        order = Batch.order(kv)
        everything = Batch(
            [kv[i] for i in order],
            [kv[i] for i in order],
            block_table=table[torch.tensor(order, device=group.torch_device)],
            slot_mapping=torch.cat([slots[i] for i in order]).to(group.torch_device),
        )
        k, v = (_reordered(t, kv, order) for t in (inputs.k, inputs.v))
        group.write_kv(k, v, cache, group.plan(everything))
    return batch, cache


def _reordered(t: Tensor, lens: list[int], order: list[int]) -> Tensor:
    if order == list(range(len(lens))):
        return t
    parts = torch.split(t, lens)
    return torch.cat([parts[i] for i in order])


def _call(group: BoundGroup, shape: Shape, inputs: Inputs, cache: KVCache | None, plan: Plan) -> Callable[[], Tensor]:
    run = group.forward if shape.kind == "mixed" else getattr(group, shape.role)
    k: Tensor | None
    v: Tensor | None
    k, v = inputs.new(shape) if shape.kind == "mixed" else (inputs.k, inputs.v)
    if shape.role == "decode" and shape.kind != "mixed":
        k = v = None
    q: Any = inputs.q
    if group.spec.kind == "mla" and group.mla_query == "split" and shape.role == "decode":
        q = tuple(t.contiguous() for t in q.split([group.spec.latent_dim or 0, group.spec.rope_dim or 0], -1))
    width = (group.spec.latent_dim if group.bindings[shape.role].form == "absorbed" else group.spec.v_head_dim) or 0
    out = torch.empty(inputs.q.shape[0], group.spec.num_heads, width, dtype=inputs.q.dtype, device=inputs.q.device)

    def call() -> Tensor:
        got: Tensor = run(q, k, v, cache, plan, out=out)
        return got

    return call
