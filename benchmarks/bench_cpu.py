"""CPU kernels against torch's own forms, in turn in one process: wall time on two threads, as ratios with spread.

The peers are the forms a torch user would write: per sequence ``index_select`` of the pages and SDPA with the GQA group
packed into the query length; all pages of the batch gathered and SDPA with ``enable_gqa``; and, for prefill, plain
causal SDPA on contiguous tensors.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Result, paired, ratios, result

from attn_core import Batch, get_platform

HQ, HK, D, PAGE = 32, 8, 128, 16
CELLS = [(b, ctx) for b in (1, 8, 32) for ctx in (1024, 4096)]


def decode() -> Iterator[Result]:
    torch.set_num_threads(2)
    naive_ratios = []
    for batch_size, ctx in CELLS:
        generator = torch.Generator().manual_seed(batch_size * ctx)
        attn = get_platform("cpu").attention_backend(
            num_heads=HQ, num_kv_heads=HK, head_dim=D, dtype="bfloat16", backend="torch_native", page_size=PAGE
        )
        pages = batch_size * ctx // PAGE
        cache = attn.new_kv_cache(pages + 1)
        for side in (cache.k, cache.v):
            side.copy_(torch.randn(side.shape, generator=generator).to(side.dtype))
        table = (torch.randperm(pages, generator=generator) + 1).view(batch_size, -1).int()
        q = torch.randn(batch_size, HQ, D, generator=generator).bfloat16()
        plan = attn.plan(Batch([1] * batch_size, [ctx] * batch_size, block_table=table))
        out = torch.empty_like(q)
        rows = table.long()
        buffers = [torch.empty(ctx // PAGE, PAGE, HK, D, dtype=torch.bfloat16) for _ in range(2)]

        def ours() -> torch.Tensor:
            return attn.decode(q, None, None, cache, plan, out=out)  # noqa: B023

        def packed() -> torch.Tensor:
            for i in range(batch_size):  # noqa: B023
                k, v = (
                    torch.index_select(side, 0, rows[i], out=buf).view(ctx, HK, D).transpose(0, 1)[None]  # noqa: B023
                    for side, buf in zip((cache.k, cache.v), buffers)  # noqa: B023
                )
                o = F.scaled_dot_product_attention(q[i].view(1, HK, HQ // HK, D), k, v)  # noqa: B023
                out[i] = o.view(HQ, D)  # noqa: B023
            return out  # noqa: B023

        def gathered() -> torch.Tensor:
            k, v = (side[rows].view(batch_size, ctx, HK, D).transpose(1, 2) for side in (cache.k, cache.v))  # noqa: B023
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]  # noqa: B023

        torch.testing.assert_close(ours().clone(), gathered(), rtol=3e-2, atol=3e-3)
        a, b, c = paired((ours, packed, gathered), rounds=7 if batch_size * ctx < 100_000 else 5)
        cell = f"decode B{batch_size} ctx{ctx}"
        gib = 2 * batch_size * ctx * HK * D * 2 / 1e9
        note = f"{gib / statistics.median(a):.1f} GB/s"
        yield result(
            f"{cell}: per-sequence packed SDPA / ours", ratios(a, b), "x", limit=0.95, at_most=False, note=note
        )
        naive = ratios(a, c)
        naive_ratios.append(statistics.median(naive))
        yield result(f"{cell}: gather + enable_gqa / ours", naive, "x", limit=5, at_most=False)
    yield result("decode: gather + enable_gqa / ours, geometric mean", [statistics.geometric_mean(naive_ratios)], "x",
                 limit=8, at_most=False)  # fmt: skip


def prefill() -> Iterator[Result]:
    torch.set_num_threads(2)
    for batch_size, n in ((1, 1024), (1, 2048), (1, 4096), (4, 1024)):
        generator = torch.Generator().manual_seed(n)
        attn = get_platform("cpu").attention_backend(
            num_heads=HQ, num_kv_heads=HK, head_dim=D, dtype="bfloat16", backend="torch_native", page_size=PAGE
        )
        tokens = batch_size * n
        cache = attn.new_kv_cache(tokens // PAGE + 1)
        table = (torch.arange(tokens // PAGE) + 1).view(batch_size, -1).int()
        slots = (table.long()[:, :, None] * PAGE + torch.arange(PAGE)).view(-1)
        plan = attn.plan(Batch([n] * batch_size, [n] * batch_size, block_table=table, slot_mapping=slots))
        q = torch.randn(tokens, HQ, D, generator=generator).bfloat16()
        k, v = (torch.randn(tokens, HK, D, generator=generator).bfloat16() for _ in range(2))
        attn.write_kv(k, v, cache, plan)
        out = torch.empty_like(q)
        qb, kb, vb = (t.view(batch_size, n, -1, D).transpose(1, 2) for t in (q, k, v))

        def ours() -> torch.Tensor:
            return attn.prefill(q, k, v, cache, plan, out=out)  # noqa: B023

        def sdpa() -> torch.Tensor:
            return F.scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=True)  # noqa: B023

        torch.testing.assert_close(ours().view(batch_size, n, HQ, D).transpose(1, 2), sdpa(), rtol=3e-2, atol=1e-2)
        a, b = paired((ours, sdpa), rounds=7 if tokens < 4096 else 5)
        flops = 2 * batch_size * HQ * n * n * D
        note = f"{flops / statistics.median(a) / 1e9:.0f} GFLOP/s"
        yield result(
            f"prefill {batch_size} x {n}: SDPA / ours", ratios(a, b), "x", limit=0.95, at_most=False, note=note
        )


ALL = (decode, prefill)
