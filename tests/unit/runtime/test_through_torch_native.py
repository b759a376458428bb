"""The built-in kernels behind a bound group: the same answers as the definition, by every way in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from simple_kernels import NATIVE, Pick, group, paged, pages_of, spec
from test_bound_group import BATCHES, expected, filled, qkv
from test_prefill_with_context import MLA, new_rows, step
from test_prefill_with_context import expected as expected_mla

from attn_core.runtime import BoundGroup

NATIVE_PICKS: dict[str, Any] = {
    role: Pick(backend="torch_native", bind=f"attn_core.backends.torch_native.{bind}", claims=NATIVE)
    for role, bind in {
        "prefill": "prefill:bind",
        "decode": "decode:bind",
        "kv_write": "kv_write:bind",
    }.items()
}


def native(s: Any, forms: dict[str, str] | None = None, **rest: Any) -> BoundGroup:
    picks = {role: replace(p, form=(forms or {}).get(role)) for role, p in NATIVE_PICKS.items()}
    return group(s, **picks, **rest)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", BATCHES)
def test_forward(kind: str, layout: str) -> None:
    s, batch = spec(v_head_dim=5), paged(*BATCHES[kind])
    g = native(s, values={"kv_layout": layout}, options={"lse": True})
    reference, keys, values = filled(group(s), batch)
    cache = g.new_kv_cache(reference.num_pages)
    cache.k.copy_(reference.k)
    cache.v.copy_(reference.v)
    q, k, v = qkv(batch, s)
    plan, out = g.plan(batch), torch.full((batch.num_tokens, 6, 5), float("nan"))
    o, lse = expected(batch, s, keys, values)
    got, got_lse = g.forward(q, k, v, cache, plan, out=out, return_lse=True)
    assert got is out
    torch.testing.assert_close(out, o)
    torch.testing.assert_close(got_lse, lse)
    reading = g.plan(batch.with_pages(batch.block_table, None), out=plan)
    torch.testing.assert_close(g.forward(q, None, None, cache, reading), o)


def test_decode_and_prefill_called_by_themselves() -> None:
    s, batch = spec(), paged(*BATCHES["mixed"])
    g = native(s)
    cache, keys, values = filled(g, batch)
    q, k, v = qkv(batch, s)
    plan = g.plan(batch)
    g.write_kv(k, v, cache, plan)
    parts = g.decode(q[:2], None, None, cache, plan), g.prefill(q[2:], k[2:], v[2:], cache, plan)
    torch.testing.assert_close(torch.cat(parts), expected(batch, s, keys, values)[0])


def test_prefill_with_context() -> None:
    from test_prefill_with_context import expand

    g = native(spec(**MLA), {"prefill": "materialised", "decode": "absorbed"}, options={"lse": True})
    batch, cache, q, latent, rope = step(g)
    k, v = new_rows(batch, latent, rope)
    plan = g.plan(batch)
    for chunk_tokens in (None, 3, 8):
        got = g.prefill_with_context(q, k, v, cache, plan, expand, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(got, expected_mla(batch, q, latent, rope)[0])


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8"])
def test_quantised_caches_write_and_read_with_their_scales(dtype: str) -> None:
    s, batch = spec(), paged([1, 5], [1, 5])
    g = native(s, values={"kv_cache_dtype": dtype})
    scale = 0.03 if dtype == "int8" else 0.01
    cache = g.new_kv_cache(pages_of(batch), k_scale=scale, v_scale=torch.tensor([scale, 2 * scale]))
    q, k, v = qkv(batch, s)
    got = g.forward(q, k, v, cache, g.plan(batch))
    torch.testing.assert_close(got, expected(batch, s, k, v)[0], rtol=0.1, atol=0.1)
