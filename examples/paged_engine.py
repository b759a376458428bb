"""A small continuous-batching engine on paged KV caches: what a serving engine does with attn-core, in one file.

Every step mixes decode rows and chunks of prompts. Each group of layers (full, sliding window) has a pool of pages
smaller than all requests together need: pages come back when a request ends, when a window has moved past them, and
when the youngest request is preempted because the pool ran dry. Block tables, slots and plans are made per group.

    python examples/paged_engine.py
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from gpt_oss_tiny import generate_eager, make_model, make_prompts
from torch import Tensor
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

from attn_core import AttentionBackend, Batch, ModelSpec, Platform, get_platform
from attn_core.runtime import Plan


class PagedDecoder:
    """A GPT-OSS of Hugging Face with all its own modules, but for attention: that is attn-core's, on paged caches."""

    def __init__(self, model: GptOssForCausalLM, attn: AttentionBackend, num_pages: Mapping[str, int]) -> None:
        self.model, self.device, self.attn = model, model.device, attn
        layers = model.model.layers
        self.groups = [self.attn.group_of(i) for i in range(len(layers))]
        self.caches = [group.new_kv_cache(num_pages[group.name]) for group in self.groups]
        self.sinks = [
            group.prepare_sinks(layer.self_attn.sinks.detach()) if group.spec.sinks else None
            for group, layer in zip(self.groups, layers)
        ]

    @torch.inference_mode()
    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], plans: Mapping[str, Plan], last: Sequence[int]
    ) -> Tensor:
        """Packed tokens of all rows -> logits ``(len(last), vocabulary)`` at the places ``last``."""
        ids = torch.tensor(tokens, device=self.device)
        x = self.model.model.embed_tokens(ids)[None]
        cos, sin = self.model.model.rotary_emb(x, torch.tensor(positions, device=self.device)[None])
        for layer, group, cache, sinks in zip(self.model.model.layers, self.groups, self.caches, self.sinks):
            a, h = layer.self_attn, layer.input_layernorm(x)[0]
            q, k, v = (p(h).unflatten(-1, (-1, a.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
            q, k = apply_rotary_pos_emb(q, k, cos[0], sin[0])
            o = group.forward(q, k, v, cache, plans[group.name], sinks=sinks)
            x = x + a.o_proj(o.flatten(1))[None]
            x = x + layer.mlp(layer.post_attention_layernorm(x))[0]
        return self.model.lm_head(self.model.model.norm(x)[0, last])


class PagePool:
    """Ids of a group's pages, handed out in no particular order. Page 0 is the null page and never handed out."""

    def __init__(self, num_pages: int, seed: int) -> None:
        self.free = list(range(1, num_pages))
        random.Random(seed).shuffle(self.free)
        self.size, self.handed_out, self.ever = num_pages - 1, 0, set[int]()

    def take(self) -> int:
        page = self.free.pop()
        self.handed_out += 1
        self.ever.add(page)
        return page

    def give(self, pages: Iterable[int]) -> None:
        self.free.extend(page for page in pages if page)

    @property
    def reused(self) -> int:
        """How often a page was handed out that somebody had used before: its old keys are still in it."""
        return self.handed_out - len(self.ever)


@dataclass(eq=False)
class Request:
    prompt: list[int]
    max_new: int
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Leading tokens whose keys are in the caches."""
    pages: dict[str, list[int]] = field(default_factory=dict)
    """Group -> block table; 0 where a window has moved past a page."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def pending(self) -> int:
        return len(self.prompt) + len(self.output) - self.computed

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.max_new - 1  # the last token's keys are never needed


@dataclass
class Stats:
    steps: int = 0
    mixed_steps: int = 0
    """Steps with decode rows and chunks of prompts in one batch."""
    chunks: int = 0
    preemptions: int = 0
    waits: int = 0
    """Steps in which a request could not be admitted for lack of pages."""
    pages: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Group -> (pages in the pool, pages all requests need, pages reused)."""


class Engine:
    """Schedules requests over a decoder. ``token_budget`` bounds a step's tokens, ``max_seqs`` its rows."""

    def __init__(
        self, decoder: PagedDecoder, num_pages: Mapping[str, int], *, token_budget: int, max_seqs: int
    ) -> None:
        self.decoder, self.token_budget, self.max_seqs = decoder, token_budget, max_seqs
        self.groups = decoder.attn.groups
        self.pools = {name: PagePool(num_pages[name], seed) for seed, name in enumerate(self.groups)}
        self.plans: dict[str, Plan] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.stats = Stats()

    def run(self, requests: Sequence[Request], tick: Callable[[int], None] = lambda tokens: None) -> Stats:
        """Until every request has its tokens. ``tick`` is told the number of new tokens after each step."""
        for name, group in self.groups.items():
            keys = [r.longest for r in requests]
            window = group.spec.sliding_window
            live = max(keys) if window is None else min(max(keys), window + self.token_budget + group.page_size)
            if -(-live // group.page_size) > self.pools[name].size:
                raise ValueError(f"{self.pools[name].size} pages of group {name} do not hold the longest request")
        self.waiting.extend(requests)
        while self.waiting or self.running:
            tick(self.step())
        for name, pool in self.pools.items():
            page = self.groups[name].page_size
            self.stats.pages[name] = (pool.size, sum(-(-r.longest // page) for r in requests), pool.reused)
        return self.stats

    # one step -----------------------------------------------------------------------------------------------------

    def step(self) -> int:
        rows = list(self.schedule().items())
        rows = [rows[i] for i in Batch.order([n for _, n in rows])]  # decode rows first
        counts = [n for _, n in rows]
        tokens = [t for r, n in rows for t in r.tokens[r.computed : r.computed + n]]
        positions = [p for r, n in rows for p in range(r.computed, r.computed + n)]
        self.plan(rows)
        ends = torch.tensor(counts).cumsum(0).sub(1).tolist()
        finished = [(r, end) for (r, n), end in zip(rows, ends) if n == r.pending]  # the others' prompts go on
        logits = self.decoder(tokens, positions, self.plans, [end for _, end in finished])
        for r, n in rows:
            r.computed += n
        for (r, _), token in zip(finished, logits.argmax(-1).tolist()):
            r.output.append(token)
            if len(r.output) == r.max_new:
                self.running.remove(r)
                self.release(r)
        self.stats.steps += 1
        self.stats.chunks += sum(n > 1 for n in counts)
        self.stats.mixed_steps += min(counts) == 1 < max(counts)
        return len(finished)

    def plan(self, rows: Sequence[tuple[Request, int]]) -> None:
        """One view of the step per group, its own pages and slots; plans are refilled, not made anew."""
        batch, device = None, self.decoder.device
        for name, group in self.groups.items():
            page, tables = group.page_size, [r.pages[name] for r, _ in rows]
            width = max(map(len, tables))
            table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, device=device)
            places = [(t, p) for t, (r, n) in zip(tables, rows) for p in range(r.computed, r.computed + n)]
            slots = torch.tensor([t[p // page] * page + p % page for t, p in places], device=device)
            if batch is None:
                query_lens, kv_lens = [n for _, n in rows], [r.computed + n for r, n in rows]
                batch = Batch(query_lens, kv_lens, block_table=table, slot_mapping=slots)
            else:
                batch = batch.with_pages(table, slots)
            self.plans[name] = group.plan(batch, out=self.plans.get(name))

    # who runs -----------------------------------------------------------------------------------------------------

    def schedule(self) -> dict[Request, int]:
        """Request -> tokens in this step: running ones first, of them those that decode, then new ones."""
        step: dict[Request, int] = {}
        preemptions = self.stats.preemptions
        for r in sorted(self.running, key=lambda r: r.pending > 1):
            n = min(r.pending, self.token_budget - sum(step.values()))
            while n and r in self.running:
                if self.reserve(r, n):
                    step[r] = n
                    break
                step.pop(self.preempt(), None)
        while self.waiting and self.stats.preemptions == preemptions and len(self.running) < self.max_seqs:
            r = self.waiting[0]
            n = min(r.pending, self.token_budget - sum(step.values()))
            if not n or not self.reserve(r, n):
                self.stats.waits += bool(n)
                break
            self.running.append(self.waiting.popleft())
            step[r] = n
        return step

    def preempt(self) -> Request:
        """Send the youngest request back to the queue; its keys will be computed again, generated tokens and all."""
        r = self.running.pop()
        self.release(r)
        r.computed = 0
        self.waiting.appendleft(r)
        self.stats.preemptions += 1
        return r

    def reserve(self, r: Request, n: int) -> bool:
        """Pages of every group for ``n`` more tokens; all or none."""
        need = {}
        for name, group in self.groups.items():
            table = r.pages.setdefault(name, [])
            if group.spec.sliding_window is not None:  # pages that no query will see again
                passed = max(0, r.computed - group.spec.sliding_window + 1) // group.page_size
                self.pools[name].give(table[:passed])
                table[:passed] = [0] * passed
            need[name] = -(-(r.computed + n) // group.page_size) - len(table)
        if any(count > len(self.pools[name].free) for name, count in need.items()):
            return False
        for name, count in need.items():
            r.pages[name] += [self.pools[name].take() for _ in range(count)]
        return True

    def release(self, r: Request) -> None:
        for name, table in r.pages.items():
            self.pools[name].give(table)
        r.pages = {}


# the comparison -------------------------------------------------------------------------------------------------------


def serve(
    model: GptOssForCausalLM,
    prompts: Sequence[list[int]],
    max_new: Sequence[int],
    *,
    spec: ModelSpec | None = None,
    page_size: int = 4,
    num_pages: Mapping[str, int] | None = None,
    token_budget: int = 24,
    max_seqs: int = 6,
    platform: Platform | None = None,
    tick: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[list[int]], Stats]:
    """Greedy tokens of every request, and how the engine got there. ``spec`` is what the config says unless given."""
    spec = spec or ModelSpec.from_hf_config(model.config)
    num_pages = num_pages or {"full": 26, "sliding": 24}
    attn = (platform or get_platform()).attention_backend(spec, page_size=page_size)
    decoder = PagedDecoder(model, attn, num_pages)
    requests = [Request(list(p), n) for p, n in zip(prompts, max_new)]
    stats = Engine(decoder, num_pages, token_budget=token_budget, max_seqs=max_seqs).run(requests, tick)
    return [r.output for r in requests], stats


def negative_controls(spec: ModelSpec) -> dict[str, ModelSpec]:
    """Three wrong models. If tokens did not change under them, equal tokens would prove nothing."""
    sliding, groups = spec.groups["sliding"], spec.groups.items()
    return {
        "sinks dropped": replace(spec, groups={n: replace(g, sinks=False) for n, g in groups}),
        "window one short": replace(
            spec, groups={**spec.groups, "sliding": replace(sliding, sliding_window=sliding.sliding_window - 1)}
        ),
        "scale 1% off": replace(spec, groups={n: replace(g, scale=g.softmax_scale * 1.01) for n, g in groups}),
    }


def main() -> None:
    torch.set_num_threads(1)
    model, prompts = make_model(), make_prompts(10)
    max_new = [12 + 3 * (i % 5) for i in range(len(prompts))]
    expected = [generate_eager(model, p, n) for p, n in zip(prompts, max_new)]
    got, stats = serve(model, prompts, max_new)
    print(stats)
    print("distinct tokens", len({t for out in expected for t in out}), "equal", got == expected)
    for name, wrong in negative_controls(ModelSpec.from_hf_config(model.config)).items():
        out, _ = serve(model, prompts, max_new, spec=wrong)
        print(name, "changes", sum(a != b for a, b in zip(out, expected)), "of", len(prompts), "requests")
    if got != expected:
        raise SystemExit("tokens differ from transformers' eager generation")


if __name__ == "__main__":
    main()
