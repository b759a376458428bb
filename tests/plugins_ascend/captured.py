"""Decode steps captured once and replayed with other lengths, pages and inputs, on every layer of a small model."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attn_core import Batch
from attn_core.runtime import BoundGroup, Capture, KVCache, Plan
from attn_core.testing import reference
from attn_core.testing.compare import differences
from numerics.kernel_cases import DTYPES, extras, random, slots, table
from simulators.harness import Case, Lengths, Rows, bound
from simulators.standin import StandIn, installed

STEPS = ((9, 130, 4), (10, 131, 5, 1), (257, 3), (1, 1, 300, 128))
"""Key lengths of the rows of one step after the other."""
ROOM = 4
LONGEST = 300


@dataclass
class Captured:
    """One graph with its plan, the memory it reads and its outputs."""

    group: BoundGroup
    case: Case
    graph: Any
    plan: Plan
    q: Any
    k: Tensor
    v: Tensor
    caches: list[KVCache]
    more: dict[str, Any]
    outputs: list[Any]
    generator: torch.Generator
    given: dict[str, Any] = field(default_factory=dict)
    """``more`` as the kernels want it."""

    @property
    def width(self) -> int:
        return int(self.case.batch.get("decode_width", 1))

    def run(self) -> list[Any]:
        """Every layer's result."""
        return [
            self.group.forward(self.q, self.k, self.v, cache, self.plan, return_lse=self.case.lse, **self.given)
            for cache in self.caches
        ]

    def inputs(self) -> None:
        """New inputs where the graph reads them."""
        for t in (*(self.q if isinstance(self.q, tuple) else (self.q,)), self.k, self.v):
            t.copy_(random(self.generator, t.dtype, *t.shape))

    def fill(self, kv_lens: Sequence[int]) -> Batch:
        """Plan the next step."""
        query = [self.width] * len(kv_lens)
        pages, _ = table(kv_lens, 128, self.generator)
        place = self.q[0].device if isinstance(self.q, tuple) else self.q.device
        batch = Batch(
            query, [max(n, self.width) for n in kv_lens], block_table=pages.to(place),
            slot_mapping=slots(pages, query, [max(n, self.width) for n in kv_lens], 128).to(place), **self.case.batch,
        )  # fmt: skip
        self.plan = self.group.plan(batch, out=self.plan)
        return batch

    def replay(self) -> None:
        self.graph.replay()

    def wrong(self, batch: Batch) -> list[str]:
        """What is wrong with the outputs of the step that was replayed last, and with what it wrote."""
        n, found = batch.num_tokens, list[str]()
        for layer, cache in enumerate(map(self.case.plain, self.caches)):
            for t, new in zip(cache.data, (self.k, self.v)):
                keys = (t.transpose(1, 2) if cache.layout == "HND" else t).flatten(0, 1).cpu()
                if not torch.equal(keys[batch.slot_mapping.cpu()], new[:n].cpu()) or keys[:128].any():
                    found.append(f"layer {layer}: new keys are not where they belong")
        q = tuple(t[:n].cpu() for t in self.q) if isinstance(self.q, tuple) else self.q[:n].cpu()
        there = Batch(batch.query_lens, batch.kv_lens, block_table=batch.block_table.cpu(), **self.case.batch)
        for layer, (cache, got) in enumerate(zip(self.caches, self.outputs)):
            want, want_lse = reference.attention(
                self.group.spec, there, q, kv_cache=self.case.plain(cache), scale=self.group.scale, **self.more
            )
            o, lse = got if self.case.lse else (got, None)
            lse = None if lse is None else lse[:n].cpu()
            wrong = differences(o[:n].cpu(), want, o.dtype, lse=lse, want_lse=want_lse if self.case.lse else None)
            found += [f"layer {layer}: {w}" for w in wrong]
        return found


def capture(rows: Rows, case: Case, npu: StandIn, place: str = "cpu", **more: Any) -> Captured:
    """One graph of one group, see ``prepare``."""
    made = prepare(rows, case, npu, place, **more)
    record(npu, made, place=place)
    return made


def record(npu: StandIn, *groups: Captured, place: str = "cpu") -> None:
    """Capture the layers of all ``groups`` in one graph, which they share then."""
    with installed(npu):
        graphs: ModuleType = importlib.import_module("torch_npu.npu.graphs")
        streams: ModuleType = importlib.import_module("torch_npu.npu")
    graph = graphs.NPUGraph()
    with graphs.graph(graph, stream=streams.Stream(device=place)):
        for made in groups:
            made.graph, made.outputs = graph, made.run()


def prepare(
    rows: Rows, case: Case, npu: StandIn, place: str = "cpu", seed: int = 0, layers: int = 2,
    group: BoundGroup | None = None,
) -> Captured:  # fmt: skip
    """Bind (unless ``group`` is), plan a step of dummies (one row of one page, the rest padding), and warm up."""
    with installed(npu):
        group = group or bound(rows, replace(case, options={"graph": "decode", **case.options}), place)
    g, s = torch.Generator().manual_seed(seed), group.spec
    width, dtype = int(case.batch.get("decode_width", 1)), DTYPES[s.dtype]
    tokens = ROOM * width

    def new(*shape: int) -> Tensor:
        return random(g, dtype, tokens, *shape).to(place)

    if s.kind == "mla":
        q: Any = tuple(new(s.num_heads, w) for w in (s.latent_dim or 0, s.rope_dim or 0))
        k, v = new(s.latent_dim or 0), new(s.rope_dim or 0)
    else:
        q, k, v = new(s.num_heads, s.head_dim), new(s.num_kv_heads, s.head_dim), new(s.num_kv_heads, s.v_head_dim)
    caches = [group.new_kv_cache(1 + ROOM * 3) for _ in range(layers)]
    for cache in caches:
        for t in cache.data:
            t[1:] = random(g, t.dtype, *t[1:].shape).to(place)
    more = extras(s, Lengths([1], [1]), g)
    if "sinks" in more:
        more["sinks"] = more["sinks"].to(dtype).float()
    made = Captured(group, case, None, group.plan(
        Batch([width], [width], block_table=torch.ones(1, 1, dtype=torch.int32, device=place),
              slot_mapping=torch.arange(128, 128 + width, device=place), **case.batch),
        capture=Capture(max_seqs=ROOM, decode_width=width, max_kv_len=LONGEST),
    ), q, k, v, caches, more, [], g)  # fmt: skip

    made.given.update({n: group.prepare_sinks(t.to(place)) for n, t in more.items()})
    made.run()
    return made


def wrong(rows: Rows, case: Case, npu: StandIn, steps: Sequence[Sequence[int]] = STEPS) -> list[str]:
    """Capture, then replay ``steps``; one of them is planned twice, as when a step is given up."""
    made, found = capture(rows, case, npu), list[str]()
    for i, lengths in enumerate(steps):
        if i == 2:
            made.fill((7, 7))
        batch = made.fill(lengths)
        made.inputs()
        made.replay()
        found += [f"step {i}, {w}" for w in made.wrong(batch)]
    return found
