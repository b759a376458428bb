"""The keys of transformers as pages: the block table finds every key, in place where strides allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_core import Batch, get_platform
from attn_core.integrations.hf_keys import KeyPages
from attn_core.integrations.hf_mask import Rows
from attn_core.runtime import BoundGroup, wrap_kv_cache

HEADS, WIDTHS = 2, (16, 8)


def group_of(page_size: int, layout: str = "NHD") -> BoundGroup:
    attn = get_platform("cpu").attention_backend(
        num_heads=4, num_kv_heads=HEADS, head_dim=WIDTHS[0], v_head_dim=WIDTHS[1], dtype="float32",
        page_size=page_size, kv_layout=layout, backend="torch_native",
    )  # fmt: skip
    (group,) = attn.groups.values()
    return group


GROUPS = {(p, layout): group_of(p, layout) for p in (1, 4) for layout in ("NHD", "HND")}


def tensor(order: str, batch: int, keys: int, width: int) -> Tensor:
    """``(batch, heads, keys, width)`` of different numbers, as some cache lays it out."""
    size = batch * HEADS * keys * width
    x = torch.arange(size, dtype=torch.float32)
    if order == "heads first":
        return x.view(batch, HEADS, keys, width)
    if order == "tokens first":
        return x.view(batch, keys, HEADS, width).transpose(1, 2)
    if order == "a part of wider rows":
        return torch.arange(2.0 * size).view(batch, HEADS, keys, 2 * width)[..., width:]
    if order == "the end of a longer one":
        return torch.arange(3.0 * size).view(batch, HEADS, 3 * keys, width)[:, :, 2 * keys :]
    return x.view(width, keys, HEADS, batch).permute(3, 2, 1, 0)  # columns apart: no strides of pages help


ORDERS = ("heads first", "tokens first", "a part of wider rows", "the end of a longer one", "columns apart")


@st.composite
def rows(draw: st.DrawFn) -> tuple[Rows, int, int]:
    """(rows, sequences of the padded batch, its keys)."""
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    first = [draw(st.integers(0, keys - 1)) for _ in range(batch)]
    lens = [draw(st.integers(1, keys - a)) for a in first]
    order = draw(st.permutations(range(batch)))[: draw(st.integers(1, batch))]
    first, lens = ([x[i] for i in order] for x in (first, lens))
    one = (1,) * len(order)
    made = Rows(sequences=tuple(order), first_query=one, query_lens=one, first_key=tuple(first), kv_lens=tuple(lens))
    return made, batch, keys


@given(rows(), st.sampled_from(ORDERS), st.sampled_from(ORDERS), st.sampled_from(list(GROUPS)))
def test_every_key_is_where_the_block_table_says(case, order_k, order_v, which):
    made, batch, keys = case
    k, v = (tensor(order, batch, keys, width) for order, width in zip((order_k, order_v), WIDTHS))
    pages = KeyPages(GROUPS[which])
    paging = pages.paging(k, v, made)
    table, cache = pages.table(paging, made), pages.wrap(k, v, paging)
    assert (cache.page_size, cache.layout) == which
    for i, (s, a, n) in enumerate(zip(made.sequences, made.first_key, made.kv_lens)):
        place = torch.arange(n)
        page = table[i, place // which[0]].long()
        for paged, given_ in ((cache.k, k), (cache.v, v)):
            assert torch.equal(paged[page, place % which[0]], given_[s, :, a : a + n].transpose(0, 1))


@pytest.mark.parametrize("order", ORDERS[:4])
def test_nothing_is_copied_where_pages_hold_one_token(order):
    k, v = (tensor(order, 3, 7, width) for width in WIDTHS)
    pages = KeyPages(GROUPS[1, "NHD"])
    made = Rows(sequences=(1, 2), first_query=(0, 0), query_lens=(1, 1), first_key=(0, 3), kv_lens=(7, 4))
    cache = pages.wrap(k, v, pages.paging(k, v, made))
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == (k.data_ptr(), v.data_ptr())


def test_pages_in_a_row_give_what_scattered_pages_give():
    """torch_native copies a run of pages and gathers others."""
    generator = torch.Generator().manual_seed(3)
    for (page, layout), group in GROUPS.items():
        count, lens = -(-37 // page), (37, 30)
        tables = [torch.arange(1, 1 + 2 * count), torch.randperm(2 * count, generator=generator) + 1]
        data = [torch.randn(2 * count, page, HEADS, w, generator=generator) for w in WIDTHS]
        q, results = torch.randn(1 + 5, 4, 16, generator=generator), []
        for table in tables:
            own = [torch.zeros(2 * count + 1, page, HEADS, w) for w in WIDTHS]
            for to, of in zip(own, data):
                to[table] = of
            tensors = [x if layout == "NHD" else x.transpose(1, 2).contiguous() for x in own]
            batch = Batch([1, 5], lens, block_table=table.view(2, count).int())
            cache = wrap_kv_cache(*tensors, layout=layout)
            results.append(group.forward(q, None, None, cache, group.plan(batch)))
        assert torch.equal(*results)


def test_one_key_has_any_stride():
    """torch calls a tensor contiguous whatever the stride of an axis with one element."""
    k, v = tensor("heads first", 2, 1, WIDTHS[0]), tensor("tokens first", 2, 1, WIDTHS[1])
    made = Rows(sequences=(0, 1), first_query=(0, 0), query_lens=(1, 1), first_key=(0, 0), kv_lens=(1, 1))
    pages = KeyPages(GROUPS[1, "NHD"])
    paging = pages.paging(k, v, made)
    assert paging.copies
    cache, table = pages.wrap(k, v, paging), pages.table(paging, made)
    for paged, given_ in ((cache.k, k), (cache.v, v)):
        assert torch.equal(paged[table[:, 0].long(), 0], given_[:, :, 0])
