"""MLA: absorbed on the latent cache, materialised for prefill, context by chunks; and DSA on top."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, MIXED, Lengths, bind, fill, mla_spec, random, slots, spec, step, table

from attn_core.runtime import Batch
from attn_core.testing import reference
from attn_core.testing.compare import differences

FEATURES = {
    "plain": {},
    "softcap": {"logit_softcap": 2.0},
    "window and sinks": {"sinks": True, "sliding_window": 5},
    "scale": {"scale": 0.11},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["MLA", "MLA_SPLIT"])
@pytest.mark.parametrize("query", ["packed", "split"])
@pytest.mark.parametrize("feature", FEATURES)
def test_absorbed(dtype, layout, query, feature):
    s = mla_spec(dtype=dtype, **FEATURES[feature])
    group = bind(s, form="absorbed", mla_query=query, lse=True, page_size=4, kv_layout=layout)
    assert group.mla_query == query
    step(group).check()


@pytest.mark.parametrize("layout", ["MLA", "MLA_SPLIT"])
@pytest.mark.parametrize(("kv_dtype", "scale"), [("fp8_e4m3", 0.5), ("int8", 0.02), ("float16", 1.0)])
def test_absorbed_from_narrow_caches(layout, kv_dtype, scale):
    """Latent and rotary part share the k scale."""
    group = bind(mla_spec(), form="absorbed", lse=True, page_size=4, kv_layout=layout, kv_cache_dtype=kv_dtype)
    step(group, scales=(scale, 7.0)).check()


class Weights:
    """The up-projections of one layer: k = [latent @ w_k, rope], v = latent @ w_v, per head."""

    def __init__(self, s, dtype, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.w_k = (torch.randn(s.latent_dim, s.num_heads, s.nope_dim, generator=g) * s.latent_dim**-0.5).to(dtype)
        self.w_v = (torch.randn(s.latent_dim, s.num_heads, s.v_head_dim, generator=g) * s.latent_dim**-0.5).to(dtype)

    def expand(self, latent, rope):
        k = torch.einsum("tl,lhn->thn", latent.float(), self.w_k.float())
        v = torch.einsum("tl,lhn->thn", latent.float(), self.w_v.float())
        rope = rope.float()[:, None].expand(-1, k.shape[1], -1)
        return torch.cat([k, rope], -1).to(latent.dtype), v.to(latent.dtype)


LENGTHS = Lengths((5, 7, 4, 2), (5, 61, 40, 3))


def materialised_step(dtype, kv_dtype=None, seed=0, **fields):
    """Prefill rows with and without cached context; expanded new tokens beside the latent cache."""
    s = mla_spec(dtype=dtype, **fields)
    group = bind(s, form="materialised", lse=True, page_size=4, kv_cache_dtype=kv_dtype)
    g = torch.Generator().manual_seed(seed)
    block_table, pages = table(LENGTHS.kv, 4, g)
    cache = group.new_kv_cache(pages, k_scale=0.5 if kv_dtype == "fp8_e4m3" else 1.0)
    fill(cache, g)
    batch = Batch(
        list(LENGTHS.query), list(LENGTHS.kv), block_table=block_table,
        slot_mapping=slots(block_table, LENGTHS.query, LENGTHS.kv, 4),
    )  # fmt: skip
    tokens, weights = sum(LENGTHS.query), Weights(s, DTYPES[dtype])
    latent, rope = (random(g, DTYPES[dtype], tokens, w) for w in (s.latent_dim, s.rope_dim))
    q = random(g, DTYPES[dtype], tokens, s.num_heads, s.head_dim)
    plan = group.plan(batch)
    group.write_kv(latent, rope, cache, plan)
    return group, batch, plan, cache, weights, q, weights.expand(latent, rope)


def wanted(group, batch, cache, weights, q, new):
    """By the reference, on keys expanded from everything the cache holds; the new ones as they were given."""
    outputs, sums, token = [], [], 0
    for i, (n, m) in enumerate(zip(LENGTHS.query, LENGTHS.kv)):
        row, _ = reference.stored_keys(group.spec, cache, batch.block_table[i], m - n)
        old = row[:, 0].to(q.dtype)
        k, v = weights.expand(*old.split([group.spec.latent_dim, group.spec.rope_dim], -1))
        k, v = (torch.cat([a, b[token : token + n]]) for a, b in zip((k, v), new))
        o, lse = reference.attend(
            q[token : token + n], k, v, reference.visible(n, m), scale=group.scale, softcap=group.spec.logit_softcap
        )
        outputs.append(o)
        sums.append(lse)
        token += n
    return torch.cat(outputs), torch.cat(sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [None, 24, 5])
@pytest.mark.parametrize("fields", [{}, {"logit_softcap": 2.0}, {"scale": 0.3}], ids=str)
def test_materialised_prefill_with_context(dtype, chunk_tokens, fields):
    group, batch, plan, cache, weights, q, new = materialised_step(dtype, **fields)
    out = torch.empty(q.shape[0], group.spec.num_heads, group.spec.v_head_dim, dtype=q.dtype)
    got, lse = group.prefill_with_context(
        q, *new, cache, plan, weights.expand, chunk_tokens=chunk_tokens, out=out, return_lse=True
    )
    assert got is out
    want, want_lse = wanted(group, batch, cache, weights, q, new)
    # each partial result is rounded to the dtype before it is merged
    found = differences(got, want, q.dtype, lse=lse, want_lse=want_lse, ulps=3.0)
    assert not found, found


def test_materialised_prefill_from_an_fp8_cache():
    group, batch, plan, cache, weights, q, new = materialised_step("float32", "fp8_e4m3")
    got = group.prefill_with_context(q, *new, cache, plan, weights.expand)
    want, _ = wanted(group, batch, cache, weights, q, new)
    assert not differences(got, want, q.dtype)


def test_absorbed_and_materialised_are_the_same_attention():
    """q absorbed by w_k attends to latents; its result times w_v is what expanded keys give."""
    s = mla_spec()
    group = bind(s, form="absorbed", lse=True, page_size=4)
    st = step(group, LENGTHS)
    weights = Weights(s, torch.float32)
    g = torch.Generator().manual_seed(5)
    q = random(g, torch.float32, sum(LENGTHS.query), s.num_heads, s.head_dim)
    nope, rope = q.split([s.nope_dim, s.rope_dim], -1)
    st.q = torch.cat([torch.einsum("thn,lhn->thl", nope, weights.w_k), rope], -1)
    absorbed, lse = st.run(return_lse=True)
    got = torch.einsum("thl,lhv->thv", absorbed, weights.w_v)
    want, want_lse = wanted(group, st.batch, st.cache, weights, q, weights.expand(st.k, st.v))
    assert not differences(got, want, torch.float32, lse=lse, want_lse=want_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [None, "fp8_e4m3", "int8"])
@pytest.mark.parametrize("kind", ["absorbed", "split", "heads", "wide v"])
def test_sparse_attention_sees_what_it_is_told_to(dtype, kv_dtype, kind):
    scale = {"fp8_e4m3": 0.5, "int8": 0.02}.get(kv_dtype, 1.0)
    options = {"lse": True, "page_size": 4, "kv_cache_dtype": kv_dtype}
    if kind in ("absorbed", "split"):
        made = mla_spec(dtype=dtype, sparse="dsa", topk=6)
        layout = "MLA_SPLIT" if kind == "split" else "MLA"
        query = "split" if kind == "split" else "packed"
        group = bind(made, mla_query=query, kv_layout=layout, **options)
    else:
        made = spec(dtype=dtype, sparse="dsa", topk=6, v_head_dim=24 if kind == "wide v" else 16)
        group = bind(made, kv_layout="HND" if kind == "wide v" else "NHD", **options)
    s = step(group, scales=(scale, scale if group.spec.kind == "mla" else 1.5 * scale))
    s.check()
    with_future = s.extra["indices"].clone()
    with_future[:, -1] = 36  # after almost every query's own position, so not seen
    s.extra["indices"] = with_future
    s.check()


def test_sparse_attention_over_many_tokens_goes_in_blocks(monkeypatch):
    from attn_core.backends.torch_native import sparse

    monkeypatch.setattr(sparse, "MAX_ELEMENTS", 1000)
    step(bind(mla_spec(sparse="dsa", topk=6), lse=True, page_size=4), MIXED).check()


def test_verify_rows_of_sparse_attention():
    group = bind(mla_spec(sparse="dsa", topk=6), lse=True, page_size=4, verify_width=3, host_lengths="bounds")
    step(group, Lengths((3, 3, 9), (30, 3, 17)), decode_width=3, bounds=[33, 8, 17]).check()
