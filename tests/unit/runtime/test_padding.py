"""Kernels wider than the model: zeros in, columns and heads cut off, the model's own scale, out= honoured."""

from __future__ import annotations

from typing import Any

import pytest
import simple_kernels as sk
import torch
from simple_kernels import NATIVE, Pick, causal, dense, group, install, paged, pages_of, spec

from attn_core.errors import BadInputError, BindError
from attn_core.runtime import Batch, Binding, Kernels

SHAPES: dict[str, dict[str, Any]] = {
    "width": {"head_dim": 12},
    "heads": {"num_heads": 8},
    "both": {"head_dim": 12, "num_heads": 10},
}


@pytest.mark.parametrize("v_width", [8, 5], ids=["equal", "unequal"])
@pytest.mark.parametrize("claims", [frozenset(), NATIVE], ids=["copies", "native"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_padded_groups_compute_what_the_model_means(
    sizes: dict[str, int], claims: frozenset[str], v_width: int
) -> None:
    """GQA with 3 heads on each of 2 kv heads: padding heads must keep every head with its own kv head."""
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -2.0])
    s = spec(v_head_dim=v_width, sinks=True, alibi_slopes=(1.0, 0.5, 0.25, 0.125, 0.1, 0.05))
    pick = Pick(claims=claims, **sizes)
    g = group(s, prefill=pick, decode=pick, kv_write=Pick(head_dim=sizes.get("head_dim")))
    batch = paged([1, 1, 4], [1, 6, 4])
    cache = g.new_kv_cache(pages_of(batch))
    assert cache.k.shape[-1] == sizes.get("head_dim", 8)
    assert cache.v.shape[-1] == (sizes.get("head_dim", 8) if v_width == 8 else 5)
    old = torch.randn(5, 2, 8), torch.randn(5, 2, v_width)
    rows = batch.token_indices(4)[1:6]
    cache.k.flatten(0, 1)[rows, :, :8], cache.v.flatten(0, 1)[rows, :, :v_width] = old
    q, k, v = torch.randn(6, 6, 8), torch.randn(6, 2, 8), torch.randn(6, 2, v_width)
    plan, out = g.plan(batch), torch.full((6, 6, v_width), float("nan"))
    got, lse = g.forward(q, k, v, cache, plan, sinks=g.prepare_sinks(sinks), out=out, return_lse=True)
    assert got is out
    keys = [(k[:1], v[:1]), (torch.cat((old[0], k[1:2])), torch.cat((old[1], v[1:2]))), (k[2:], v[2:])]
    for rows_, (all_k, all_v) in zip((slice(0, 1), slice(1, 2), slice(2, 6)), keys):
        visible = causal(rows_.stop - rows_.start, len(all_k))
        o, row_lse = dense(q[rows_], all_k, all_v, 8**-0.5, visible, sinks, s.alibi_slopes)
        torch.testing.assert_close(out[rows_], o.float())
        torch.testing.assert_close(lse[rows_], row_lse.float())
    fresh = g.forward(
        q, None, None, cache, g.plan(batch.with_pages(batch.block_table, None)), sinks=g.prepare_sinks(sinks)
    )
    torch.testing.assert_close(fresh, out)
    assert fresh.stride(-1) == 1


def test_padded_encoder_with_bias_per_head() -> None:
    seen: list[torch.Tensor] = []

    def bind(b: Binding) -> Kernels:
        kernels = sk.bind(b)

        def call(q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, **rest: Any) -> Any:
            seen.append(rest["bias"])
            return kernels.call(q, k, v, kv_cache, plan, **rest)

        return Kernels(kernels.plan, call)

    s = spec(attn_type="encoder_only", bias=True, head_dim=8)
    g = group(s, encode=Pick(bind=install(bind), num_heads=8, head_dim=16))
    q, k, v = torch.randn(5, 6, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    bias = torch.randn(2, 6, 3, 3)
    plan = g.plan(Batch([2, 3], attn_type="encoder_only"))
    out = g.forward(q, k, v, None, plan, bias=bias)
    want = [
        dense(q[a], k[a], v[a], 8**-0.5, torch.ones(n, n, dtype=torch.bool))[0]
        for a, n in ((slice(0, 2), 2), (slice(2, 5), 3))
    ]
    torch.testing.assert_close(out, torch.cat(want).float())
    assert seen[0].shape == (2, 8, 3, 3)
    assert torch.equal(seen[0][:, [0, 1, 2, 4, 5, 6]], bias)
    assert seen[0][:, [3, 7]].eq(0).all()
    g.forward(q, k, v, None, plan, bias=bias[:, :1])
    assert seen[1].shape == (2, 1, 3, 3), "a bias for all heads stays one"


def test_a_binding_keeps_the_models_scale_and_spec() -> None:
    sk.BOUND.clear()
    s = spec(num_heads=3, num_kv_heads=3, head_dim=32, attn_type="encoder_only", alibi_slopes=(1.0, 0.5, 0.25))
    group(s, encode=Pick(head_dim=64, num_heads=6))
    (b,) = sk.BOUND
    assert (b.head_dim, b.v_head_dim, b.num_heads, b.num_kv_heads) == (64, 64, 6, 3)
    assert b.scale == 32**-0.5
    assert b.spec is s
    assert b.alibi_slopes == (1.0, 0.0, 0.5, 0.0, 0.25, 0.0)


def test_absorbed_mla_pads_heads_only() -> None:
    s = spec(
        kind="mla", num_heads=12, num_kv_heads=12, head_dim=12, v_head_dim=8, latent_dim=16, rope_dim=4, nope_dim=8
    )
    pick = Pick(form="absorbed", num_heads=16)
    g = group(s, prefill=pick, decode=pick, kv_write=Pick(num_heads=None))
    plain = group(s, prefill=Pick(form="absorbed"), decode=Pick(form="absorbed"))
    batch = paged([1, 3], [5, 3])
    cache = g.new_kv_cache(pages_of(batch))
    cache.data[0][1:] = torch.randn(cache.data[0][1:].shape)
    q, latent, rope = torch.randn(4, 12, 20), torch.randn(4, 16), torch.randn(4, 4)
    a, lse = g.forward(q, latent, rope, cache, g.plan(batch), return_lse=True)
    b, want = plain.forward(q, latent, rope, cache, plain.plan(batch), return_lse=True)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(lse, want)
    split = group(s, prefill=pick, decode=pick, values={"mla_query": "split"})
    torch.testing.assert_close(split.forward(q.split((16, 4), -1), latent, rope, cache, split.plan(batch)), b)
    wide = Pick(form="absorbed", head_dim=32)
    with pytest.raises(BindError, match="cannot pad"):
        group(s, prefill=wide, decode=wide)


def test_gather_cuts_the_padding_off() -> None:
    g = group(spec(), prefill=Pick(head_dim=16), decode=Pick(head_dim=16), kv_write=Pick(head_dim=16))
    batch = paged([3], [3])
    cache, plan = g.new_kv_cache(4), g.plan(batch)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    g.write_kv(k, v, cache, plan)
    assert cache.k.flatten(0, 1)[batch.slot_mapping][..., 8:].eq(0).all()

    class Chunk:
        slots = batch.slot_mapping

    got_k, got_v = g.gather_kv(cache, plan, Chunk())  # type: ignore[arg-type]
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)


# sinks ----------------------------------------------------------------------------------------------------------------


def bfloat16_sinks(sinks: torch.Tensor) -> torch.Tensor:
    return sinks.to(torch.bfloat16)


def sinks_group(decode: Any, prefill: Any) -> Any:
    def bind(b: Binding) -> Kernels:
        kernels = sk.bind(b)
        return Kernels(kernels.plan, kernels.call, prepare_sinks={"decode": decode, "prefill": prefill}.get(b.role))

    pick = Pick(bind=install(bind), claims=NATIVE)
    return group(spec(sinks=True), decode=pick, prefill=pick)


def test_sinks_are_float32_unless_the_kernel_says_otherwise() -> None:
    raw = torch.randn(6, dtype=torch.bfloat16)
    assert torch.equal(sinks_group(None, None).prepare_sinks(raw), raw.float())
    one = sinks_group(bfloat16_sinks, bfloat16_sinks)
    assert one.prepare_sinks(raw.float()).dtype == torch.bfloat16
    assert one.decode.__qualname__.startswith("bind"), "kernels that agree need no wrapper"


def test_kernels_that_want_different_sinks_each_get_their_own() -> None:
    g = sinks_group(bfloat16_sinks, None)
    raw, batch = torch.randn(6), paged([1, 4], [5, 4])
    cache, plan = g.new_kv_cache(pages_of(batch)), g.plan(batch)
    prepared = g.prepare_sinks(raw)
    g.forward(torch.randn(5, 6, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8), cache, plan, sinks=prepared)
    assert plan.decode.calls[0].sinks.dtype == torch.bfloat16
    assert torch.equal(plan.prefill.calls[0].sinks, raw)
    g.decode(torch.randn(1, 6, 8), None, None, cache, plan, sinks=prepared)
    assert plan.decode.calls[1].sinks.dtype == torch.bfloat16


def test_wrong_sinks_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"shape \(2, 3\), expected \(6,\)"):
        group(spec(sinks=True)).prepare_sinks(torch.zeros(2, 3))
    with pytest.raises(BadInputError, match="has no sinks"):
        group(spec()).prepare_sinks(torch.zeros(6))
