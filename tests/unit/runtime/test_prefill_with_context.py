"""Materialised MLA: new tokens and chunks of cached context give what attention over everything gives."""

from __future__ import annotations

from typing import Any

import pytest
import simple_kernels as sk
import torch
from simple_kernels import NATIVE, PAGE, Pick, causal, dense, group, install, paged, spec

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime import Batch, Binding, BoundGroup, Kernels

H, NOPE, ROPE, V, LATENT = 3, 8, 4, 6, 16
MLA: dict[str, Any] = {
    "kind": "mla", "num_heads": H, "num_kv_heads": H, "head_dim": NOPE + ROPE, "v_head_dim": V,
    "latent_dim": LATENT, "rope_dim": ROPE, "nope_dim": NOPE,
}  # fmt: skip
UP = torch.randn(LATENT, H, NOPE + V, generator=torch.Generator().manual_seed(7)) * LATENT**-0.5


def expand(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's up-projection: per head keys (with the shared rotary part) and values."""
    up = torch.einsum("tl,lhw->thw", latent, UP)
    return torch.cat((up[..., :NOPE], rope[:, None].expand(-1, H, -1)), dim=-1), up[..., NOPE:]


def mla_group(prefill: Pick | None = None, **changes: Any) -> BoundGroup:
    return group(
        spec(**{**MLA, **changes}), decode=Pick(form="absorbed", claims=NATIVE),
        prefill=prefill or Pick(form="materialised", claims=NATIVE), options={"lse": True},
    )  # fmt: skip


QUERY, KV = [1, 5, 3, 2], [6, 5, 14, 11]  # one decode row; context of 0, 11 and 9 keys


def step(g: BoundGroup, seed: int = 0) -> tuple[Batch, Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch, a written cache, q of the prefill rows, and every key's latent and rotary part in order."""
    gen = torch.Generator().manual_seed(seed)
    batch = paged(QUERY, KV, seed=seed)
    cache = g.new_kv_cache(16)
    cache.data[0][1:] = torch.randn(cache.data[0][1:].shape, generator=gen)
    latent, rope = torch.randn(11, LATENT, generator=gen), torch.randn(11, ROPE, generator=gen)
    g.write_kv(latent, rope, cache, g.plan(batch))
    rows = cache.data[0].flatten(0, 1)[batch.token_indices(PAGE)]
    q = torch.randn(10, H, NOPE + ROPE, generator=gen)
    return batch, cache, q, *rows.split((LATENT, ROPE), dim=-1)  # type: ignore[return-value]


def expected(batch: Batch, q: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, sinks: Any = None) -> Any:
    k, v = expand(latent, rope)
    parts = [
        dense(q[a.start - 1 : a.stop - 1], k[b], v[b], (NOPE + ROPE) ** -0.5, causal(n, m), sinks)
        for a, b, n, m in sk.sequences(batch)[1:]
    ]
    return torch.cat([o for o, _ in parts]).float(), torch.cat([lse for _, lse in parts]).float()


def new_rows(batch: Batch, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of the prefill rows' new tokens."""
    keep = torch.cat([torch.arange(b.stop - n, b.stop) for _, b, n, _ in sk.sequences(batch)[1:]])
    return expand(latent[keep], rope[keep])


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, 8, 16, 1000])
def test_chunks_merge_into_attention_over_all_keys(chunk_tokens: int | None) -> None:
    g = mla_group()
    batch, cache, q, latent, rope = step(g)
    k, v = new_rows(batch, latent, rope)
    plan = g.plan(batch)
    o, lse = expected(batch, q, latent, rope)
    out = torch.full_like(o, float("nan"))
    got, got_lse = g.prefill_with_context(
        q, k, v, cache, plan, expand, chunk_tokens=chunk_tokens, out=out, return_lse=True
    )
    assert got is out
    torch.testing.assert_close(out, o)
    torch.testing.assert_close(got_lse, lse)
    torch.testing.assert_close(g.prefill_with_context(q, k, v, cache, plan, expand), o)


def test_sinks_join_one_denominator_once() -> None:
    g = mla_group(sinks=True)
    batch, cache, q, latent, rope = step(g)
    sinks = torch.tensor([1.0, -1.0, 3.0])
    got = g.prefill_with_context(
        q, *new_rows(batch, latent, rope), cache, g.plan(batch), expand, sinks=g.prepare_sinks(sinks), chunk_tokens=4
    )
    torch.testing.assert_close(got, expected(batch, q, latent, rope, sinks)[0])


def test_chunks_cover_the_context_of_the_prefill_rows_once() -> None:
    g = mla_group()
    batch, *_ = step(g)
    plan = g.plan(batch)
    assert len(plan.chunks) == 1, "8192 tokens at a time unless asked otherwise"
    g._cut_context(plan, 11)
    (first, *more) = plan.chunks
    assert first.lens.tolist() == [0, 4, 4], "11 keys for two rows with context: 5 each, of them a whole page"
    assert all(c.num_keys <= 11 and max(c.lens.tolist()) <= 4 for c in plan.chunks)
    assert torch.stack([c.lens for c in plan.chunks]).sum(0).tolist() == [0, 11, 9]
    assert [c.starts.tolist() for c in more] == [[4, 4, 4], [8, 8, 8]]
    rest = batch.rest_part
    assert rest is not None
    slots = rest.token_indices(PAGE)
    begin = rest.cu_kv_lens.tolist()
    want = [slots[begin[r] + 4 : begin[r] + 8].tolist() for r in (1, 2)]
    assert more[0].slots.tolist() == [s for row in want for s in row]
    assert more[0].cu_kv_lens.tolist() == [0, 0, 4, 8]


def test_the_context_kernel_is_the_prefill_kernel_without_causality() -> None:
    sk.BOUND.clear()
    mla_group(sinks=True)
    causal_one, context = [b for b in sk.BOUND if b.form == "materialised"]
    assert causal_one.spec.causal
    assert not context.spec.causal
    assert (context.role, context.spec.kind, context.spec.attn_type) == ("prefill", "mha", "encoder_only")
    assert (context.num_heads, context.num_kv_heads, context.head_dim, context.v_head_dim) == (H, H, NOPE + ROPE, V)
    assert context.scale == causal_one.scale
    assert not context.spec.sinks
    assert (context.page_size, context.kv_layout, context.kv_dtype) == (None, None, None)


def test_refilling_keeps_the_context_kernels_workspaces() -> None:
    g = mla_group()
    batch, cache, q, latent, rope = step(g)
    plan = g.plan(batch)
    held = plan.chunks[0].plan.prefill
    g.plan(paged([1, 2], [1, 2]), out=plan)
    assert plan.chunks == ()
    g.plan(batch, out=plan)
    assert plan.chunks[0].plan.prefill is held
    assert held.fills == 2
    got = g.prefill_with_context(q, *new_rows(batch, latent, rope), cache, plan, expand)
    torch.testing.assert_close(got, expected(batch, q, latent, rope)[0])


def test_without_context_it_is_the_prefill_kernel_alone() -> None:
    g = mla_group()
    batch = paged([4, 2], [4, 2])
    plan, (k, v) = g.plan(batch), expand(torch.randn(6, LATENT), torch.randn(6, ROPE))
    assert plan.chunks == ()
    q, out = torch.randn(6, H, NOPE + ROPE), torch.empty(6, H, V)
    assert g.prefill_with_context(q, k, v, g.new_kv_cache(8), plan, expand, out=out) is out
    assert plan.prefill.calls[0].out is out


def test_halves_are_accumulated_in_float32() -> None:
    """Many chunks must not round many times: the errors of the parts average out instead of adding up."""
    g, errors = mla_group(), {1: 0.0, 1000: 0.0}

    def half(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.to(torch.bfloat16) for t in tensors)

    def half_expand(latent: torch.Tensor, rope: torch.Tensor) -> Any:
        return half(*expand(latent, rope))

    def rounded_expand(latent: torch.Tensor, rope: torch.Tensor) -> Any:
        return tuple(t.float() for t in half_expand(latent, rope))

    for seed in range(20):
        batch, cache, q, latent, rope = step(g, seed)
        k, v = new_rows(batch, latent, rope)
        exact = g.prefill_with_context(*(t.float() for t in half(q, k, v)), cache, g.plan(batch), rounded_expand)
        for chunk_tokens in errors:
            got = g.prefill_with_context(*half(q, k, v), cache, g.plan(batch), half_expand, chunk_tokens=chunk_tokens)
            assert got.dtype == torch.bfloat16
            errors[chunk_tokens] += float((got - exact).abs().mean())
    assert errors[1] < 1.15 * errors[1000]


def test_decode_rows_are_absorbed_and_forward_refuses_the_others() -> None:
    g = mla_group()
    decode = paged([1, 1], [6, 3])
    cache, plan = g.new_kv_cache(16), g.plan(decode)
    out = g.forward(torch.randn(2, H, LATENT + ROPE), torch.randn(2, LATENT), torch.randn(2, ROPE), cache, plan)
    assert out.shape == (2, H, LATENT)
    for batch in (paged([1, 4], [6, 4]), paged([4], [4])):
        with pytest.raises(BadInputError, match="call write_kv"):
            g.forward(None, None, None, cache, g.plan(batch))


def test_what_cannot_be_done_is_refused() -> None:
    g = mla_group()
    batch, cache, q, latent, rope = step(g)
    k, v = new_rows(batch, latent, rope)
    with pytest.raises(BadInputError, match="chunk_tokens=0"):
        g.prefill_with_context(q, k, v, cache, g.plan(batch), expand, chunk_tokens=0)
    plain = group(spec())
    with pytest.raises(AttnCoreError, match="reads the cache itself"):
        plain.prefill_with_context(q, k, v, cache, plain.plan(paged([2], [2])), expand)
    with pytest.raises(AttnCoreError, match="no prefill rows"):
        g.prefill_with_context(q, k, v, cache, g.plan(paged([1], [4])), expand)
    with pytest.raises(BadInputError, match="got a plan of group"):
        g.prefill_with_context(q, k, v, cache, mla_group().plan(batch), expand)

    def without_lse(b: Binding) -> Kernels:
        kernels = sk.bind(b)
        return Kernels(kernels.plan, lambda *a, return_lse=False, **rest: kernels.call(*a, **rest))

    mute = mla_group(Pick(form="materialised", claims=NATIVE, bind=install(without_lse)))
    with pytest.raises(BadInputError, match=r"returned no LSE.*lse=True"):
        mute.prefill_with_context(q, k, v, cache, mute.plan(batch), expand)


def test_bounds_are_not_enough_to_cut_chunks() -> None:
    g = group(
        spec(**MLA), decode=Pick(form="absorbed"), prefill=Pick(form="materialised"), options={"host_lengths": "bounds"}
    )
    true = torch.tensor([4], dtype=torch.int32)
    with pytest.raises(BadInputError, match="by exact kv_lens"):
        g.plan(paged([2], [6], kv_lens_device=true, exact=False))
