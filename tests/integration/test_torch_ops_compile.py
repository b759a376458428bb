"""A decoder under torch.compile: one graph per slot, no breaks, no recompiles, the eager answer, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from attn_core import AttentionSpec, Batch, ModelSpec, get_platform
from attn_core.integrations.torch_ops import Slot
from attn_core.runtime import AttentionBackend

OPS: Any = torch.ops.attn_core
HEADS, KV_HEADS, WIDTH, PAGE, PAGES, VOCABULARY = 4, 2, 16, 4, 40, 50
HIDDEN = HEADS * WIDTH


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * WIDTH)
        self.o = nn.Linear(HIDDEN, HIDDEN)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, cache: list[Tensor], slot: str) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, WIDTH).split((HEADS, KV_HEADS, KV_HEADS), 1)
        return x + self.o(OPS.forward(q, k, v, cache, slot, sinks=self.sinks).flatten(1))


class Decoder(nn.Module):
    """Layers alternate between the groups; the slots of a step are an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, ids: Tensor, caches: list[list[Tensor]], full: str, sliding: str) -> Tensor:
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, caches[i], sliding if i % 2 else full)
        return x @ self.embed.weight.T


@dataclass
class Engine:
    """Requests that share caches; each has its own pages, as a list of ids, in both groups the same."""

    model: Any
    attn: AttentionBackend
    caches: list[list[Tensor]]
    slots: dict[str, Slot]
    lens: dict[str, int] = field(default_factory=dict)

    def prepare(self, new: dict[str, int], pages: dict[str, list[int]]) -> int:
        """Plan a step of ``new`` tokens per request; returns how many tokens it has."""
        names = sorted(new, key=lambda n: new[n] != 1)
        query, kv = [new[n] for n in names], [self.lens.get(n, 0) + new[n] for n in names]
        table = torch.tensor([pages[n] for n in names], dtype=torch.int32)
        rows = [pages[n][p // PAGE] * PAGE + p % PAGE for n, q, m in zip(names, query, kv) for p in range(m - q, m)]
        batch = Batch(query, kv, block_table=table, slot_mapping=torch.tensor(rows))
        for name, slot in self.slots.items():
            group = self.attn.groups[name]
            slot.set(group.plan(batch.with_pages(table, batch.slot_mapping), out=slot.plan))
        self.lens.update(zip(names, kv))
        return batch.num_tokens

    def run(self, ids: Tensor) -> Tensor:
        handles = {name: slot.handle for name, slot in self.slots.items()}
        return self.model(ids, self.caches, **handles)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def attn() -> AttentionBackend:
    fields = {
        "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float32", "sinks": True,
    }  # fmt: skip
    groups = {"full": AttentionSpec(**fields), "sliding": AttentionSpec(**fields, sliding_window=6)}
    return get_platform("cpu").attention_backend(ModelSpec(groups=groups), page_size=PAGE)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def caches() -> list[list[Tensor]]:
    return [[torch.zeros(PAGES, PAGE, KV_HEADS, WIDTH) for _ in range(2)] for _ in range(4)]


def engine(model: Any, attn: AttentionBackend, shared: list[list[Tensor]] | None = None) -> Engine:
    slots = {name: Slot(group) for name, group in attn.groups.items()}
    return Engine(model, attn, caches() if shared is None else shared, slots)


def compiled(model: nn.Module, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


PAGES_OF = {"a": list(range(1, 11)), "b": list(range(20, 10, -1)), "c": list(range(21, 31))}
STEPS = [
    {"a": 7, "b": 3},
    {"a": 1, "b": 1},
    {"a": 1, "b": 1, "c": 11},
    {"a": 1, "b": 1, "c": 1},
    {"a": 1, "c": 1},
    {"a": 4, "b": 1, "c": 1},
    {"c": 5},
]


def steps() -> list[tuple[dict[str, int], Tensor]]:
    more = [{"a": 1, "b": 1, "c": 1}] * 8
    return [(new, torch.randint(0, VOCABULARY, (sum(new.values()),))) for new in [*STEPS, *more]]


def dynamic(ids: Tensor) -> Tensor:
    torch._dynamo.mark_dynamic(ids, 0)
    return ids


def test_many_steps_one_graph(model, attn):
    fast, counter = compiled(model)
    a, b = engine(fast, attn), engine(model, attn)
    plans = set()
    for new, ids in steps():
        for e in (a, b):
            assert e.prepare(new, PAGES_OF) == len(ids)
        plans.add(id(a.slots["full"].plan))
        torch.testing.assert_close(a.run(dynamic(ids)), b.run(ids))
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert len(plans) == 1
    for x, y in zip(a.caches, b.caches):
        torch.testing.assert_close(x, y)
    assert all(t[1:11].any() for layer in a.caches for t in layer)


def test_two_batches_in_flight(model, attn):
    """Both are planned before either runs; each slot's graph finds its own plan. One graph each, and none later."""
    fast, counter = compiled(model)
    shared = caches()
    pairs = [(engine(fast, attn, shared), engine(model, attn)) for _ in range(2)]
    own = ({n: PAGES_OF[n] for n in "a"}, {n: PAGES_OF[n] for n in "bc"})
    told = [[{"a": 6}, {"b": 5, "c": 2}], *[[{"a": 2}, {"b": 1, "c": 1}]] * 6]
    for step, news in enumerate(told):
        ids = [torch.randint(0, VOCABULARY, (sum(new.values()),)) for new in news]
        for pair, new, pages in zip(pairs, news, own):
            for e in pair:
                e.prepare(new, pages)
        for (quick, plain), x in list(zip(pairs, ids))[:: -1 if step % 2 else 1]:
            torch.testing.assert_close(quick.run(dynamic(x)), plain.run(x))
    assert counter.frame_count == 2
    assert len({e.slots["full"].handle for pair in pairs for e in pair}) == 4


def test_inductor_writes_into_the_engines_own_memory(model, attn, monkeypatch):
    """No cache is copied: what the kernels get is what the engine holds."""
    from attn_core.integrations import torch_slots

    fast, _ = compiled(model, "inductor")
    a, b = engine(fast, attn), engine(model, attn)
    seen = []
    real = torch_slots.Held.cache

    def watched(self: Any, slot: str, tensors: Any, *rest: Any) -> Any:
        seen.extend(t.data_ptr() for t in tensors)
        return real(self, slot, tensors, *rest)

    for new, ids in steps()[:3]:
        a.prepare(new, PAGES_OF)
        b.prepare(new, PAGES_OF)
        want = b.run(ids)
        with monkeypatch.context() as patch:
            patch.setattr(torch_slots.Held, "cache", watched)
            torch.testing.assert_close(a.run(dynamic(ids)), want)
    assert seen == [t.data_ptr() for layer in a.caches for t in layer] * 3


def test_layers_share_one_graph(model, attn):
    """Compiled layer by layer, as engines do to compile less: a graph per group, whatever the number of layers."""
    e = engine(model, attn)
    counter = CompileCounterWithBackend("aot_eager")

    def step(layer: Layer, x: Tensor, cache: list[Tensor], slot: str) -> Tensor:
        return layer(x, cache, slot)

    fast = torch.compile(step, fullgraph=True, backend=counter)
    e.prepare({"a": 5}, PAGES_OF)
    for i, layer in enumerate(model.layers):
        slot = e.slots["sliding" if i % 2 else "full"].handle
        fast(layer, dynamic(torch.randn(5, HIDDEN)), e.caches[i], slot)
    assert counter.frame_count == 2


def test_one_buffer_for_k_and_v(model, attn):
    """Caches that are views of one tensor, as many engines allocate them."""
    group = attn.groups["full"]
    slot = Slot(group)
    both = torch.zeros(2, PAGES, PAGE, KV_HEADS, WIDTH)

    def step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, sinks: Tensor) -> Tensor:
        return OPS.forward(q * 2, k, v, [kv[0], kv[1]], slot.handle, sinks=sinks) + 1

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    table, rows = torch.tensor([[3, 5]], dtype=torch.int32), torch.tensor([12, 13, 14, 15, 20])
    slot.set(group.plan(Batch([5], [5], block_table=table, slot_mapping=rows)))
    q, k, v = torch.randn(5, HEADS, WIDTH), *torch.randn(2, 5, KV_HEADS, WIDTH)
    plain, sinks = both.clone(), torch.randn(HEADS)
    torch.testing.assert_close(fast(q, k, v, both, sinks), step(q, k, v, plain, sinks))
    assert torch.equal(both, plain)
    assert both.any()


def test_out_is_the_engines_own_memory(attn):
    group = attn.groups["full"]
    slot, buffer = Slot(group), torch.full((8, HEADS, WIDTH), torch.nan)
    cache = caches()[0]

    def step(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sinks: Tensor) -> Tensor:
        OPS.forward_out(q, k, v, cache, slot.handle, out=out, sinks=sinks)
        return out.sum()

    table, rows = torch.tensor([[3, 5]], dtype=torch.int32), torch.tensor([12, 13, 14, 15, 20])
    slot.set(group.plan(Batch([5], [5], block_table=table, slot_mapping=rows)))
    q, k, v = torch.randn(8, HEADS, WIDTH), *torch.randn(2, 8, KV_HEADS, WIDTH)
    total = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, buffer, torch.randn(HEADS))
    assert total == buffer.sum()
    assert buffer[:5].any()
    assert not buffer[5:].any()


def test_handles_are_checked_while_tracing(model, attn):
    fast, _ = compiled(model)
    with pytest.raises(Exception, match=r"no slot 'nobody'.*keep Slot"):
        fast(torch.arange(4), caches(), "nobody", "nobody")
    slots = [Slot(group) for group in attn.groups.values()]
    with torch.enable_grad(), pytest.raises(Exception, match="no backward; run under"):
        compiled(model)[0](torch.arange(4), caches(), *(slot.handle for slot in slots))


def test_a_plan_cannot_be_set_inside_a_graph(attn):
    slot = Slot(attn.groups["full"])

    def step(x: Tensor) -> Tensor:
        slot.set(None)
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, fullgraph=True, backend="aot_eager")(torch.ones(2))
