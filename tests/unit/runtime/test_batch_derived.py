"""Derived forms against their definition, for generated batches, their parts and other groups' views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simple_kernels import paged, pages_of

from attn_core.runtime import Batch
from attn_core.runtime.lengths import FEW
from attn_core.runtime.lengths import Lengths as StepLengths

Lengths = list[tuple[int, int]]


@st.composite
def steps(draw: Any) -> tuple[Batch, int]:
    """A batch with random pages, and its page size; decode rows first as ``order`` says."""
    width = draw(st.integers(1, 3))
    pairs: Lengths = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 25)), min_size=1, max_size=6))
    query = [q for q, _ in pairs]
    pairs = [pairs[i] for i in Batch.order(query, width)]
    page = draw(st.sampled_from([1, 2, 4, 16]))
    batch = paged(
        [q for q, _ in pairs], [q + context for q, context in pairs], page_size=page, decode_width=width,
        seed=draw(st.integers(0, 9)),
    )  # fmt: skip
    return batch, page


def key_rows(batch: Batch, page: int) -> list[list[int]]:
    """Cache row of every key of every sequence, straight from the block table."""
    assert batch.block_table is not None
    rows = batch.block_table.tolist()
    return [[row[j // page] * page + j % page for j in range(n)] for row, n in zip(rows, batch.kv_lens.tolist())]


@given(steps())
def test_forms_of_the_whole_and_of_its_parts(step: tuple[Batch, int]) -> None:
    batch, page = step
    for part in (batch, batch.decode_part, batch.rest_part):
        if part is None:
            continue
        expected = key_rows(part, page)
        csr = part.csr(page)
        indices = part.token_indices(page)
        assert indices.tolist() == [slot for row in expected for slot in row]
        assert part.cu_kv_lens.tolist() == [sum(map(len, expected[:i])) for i in range(part.num_seqs + 1)]
        assert part.cu_kv_lens_device.tolist() == part.cu_kv_lens.tolist()
        for i, row in enumerate(expected):
            own = csr.indices[csr.indptr[i] : csr.indptr[i + 1]].tolist()
            assert own == [slot // page for slot in row[::page]]
            assert int(csr.last_page_len[i]) == (len(row) - 1) % page + 1
        assert csr.indptr_device.tolist() == csr.indptr.tolist()
        assert csr.last_page_len_device.tolist() == csr.last_page_len.tolist()
        assert (csr.indptr.dtype, csr.indices.dtype, csr.last_page_len.dtype) == (torch.int32,) * 3
        query = part.query_lens.tolist()
        assert part.cu_query_lens.tolist() == [sum(query[:i]) for i in range(len(query) + 1)]
        assert part.cu_query_lens_device.tolist() == part.cu_query_lens.tolist()
        assert part.num_tokens == sum(query)
        assert part.max_query_len == max(query)


@given(steps())
def test_the_parts_make_the_whole(step: tuple[Batch, int]) -> None:
    batch, page = step
    parts = [p for p in (batch.decode_part, batch.rest_part) if p is not None]
    assert sum(p.num_tokens for p in parts) == batch.num_tokens
    assert [n for p in parts for n in p.query_lens.tolist()] == batch.query_lens.tolist()
    assert torch.equal(torch.cat([p.token_indices(page) for p in parts]), batch.token_indices(page))
    slots = [p.slot_mapping for p in parts]
    assert torch.equal(torch.cat([s for s in slots if s is not None]), batch.slot_mapping)
    width = batch.decode_width
    assert all((n == width) == (i < batch.num_decode_rows) for i, n in enumerate(batch.query_lens.tolist()))


@given(steps())
def test_slots_are_the_last_keys_and_pass_the_checks(step: tuple[Batch, int]) -> None:
    batch, page = step
    batch.check_pages(page, pages_of(batch))
    new = [row[-q:] for row, q in zip(key_rows(batch, page), batch.query_lens.tolist())]
    assert batch.slot_mapping is not None
    assert batch.slot_mapping.tolist() == [s for row in new for s in row]


@given(steps())
def test_forms_are_made_once_and_shared(step: tuple[Batch, int]) -> None:
    batch, page = step
    assert batch.csr(page) is batch.csr(page)
    assert batch.token_indices(page) is batch.token_indices(page)
    part = batch.decode_part
    if part is not None:
        for name in ("cu_query_lens_device", "kv_lens_device", "cu_kv_lens_device"):
            assert getattr(part, name).data_ptr() == getattr(batch, name).data_ptr(), "a view, not a second transfer"
        assert part.token_indices(page).data_ptr() == batch.token_indices(page).data_ptr()
        assert part.csr(page).indices.data_ptr() == batch.csr(page).indices.data_ptr()


@given(steps(), st.integers(0, 4))
def test_padding_adds_rows_and_changes_none(step: tuple[Batch, int], extra: int) -> None:
    batch, page = step
    batch = batch.decode_part or batch
    if batch.num_decode_rows != batch.num_seqs:
        return
    padded = batch.padded(batch.num_seqs + extra)
    assert padded.num_tokens == batch.num_tokens + extra * batch.decode_width
    assert padded.token_indices(page)[: -extra or None].tolist() == batch.token_indices(page).tolist()
    assert padded.token_indices(page)[batch.token_indices(page).shape[0] :].tolist() == [0] * extra


def test_no_form_waits_for_the_device() -> None:
    """On the meta device reading a value fails, as waiting for an accelerator would be felt."""

    def away(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    batch = Batch(
        [2, 2, 5], [6, 2, 9], decode_width=2, block_table=away(3, 4), slot_mapping=away(9, dtype=torch.int64),
        tree_mask=away(2, 2, 2, dtype=torch.bool),
    )  # fmt: skip
    batch.check_pages(4)
    for part in (batch, batch.decode_part, batch.rest_part, batch.with_pages(away(3, 9), None)):
        assert part is not None
        assert part.csr(4).indices.shape == (int(part.csr(4).indptr[-1]),)
        assert part.token_indices(4).shape == (int(part.cu_kv_lens[-1]),)
        forms = ("query_lens_device", "kv_lens_device", "cu_query_lens_device", "cu_kv_lens_device")
        assert all(getattr(part, form).device.type == "meta" for form in forms)
    decode = batch.decode_part
    assert decode is not None
    assert decode.padded(4).block_table is not None
    bounds = Batch([1], [9], block_table=away(1, 3), kv_lens_device=away(1), exact=False)
    assert bounds.cu_kv_lens_device.shape == (2,)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=90), st.sampled_from([1, 3, 16, 256]))
def test_pages_of_few_and_of_many_are_counted_alike(keys: list[int], page: int) -> None:
    kv = torch.tensor(keys, dtype=torch.int32)
    lengths = StepLengths(torch.ones_like(kv), kv, torch.device("cpu"))
    counts = [-(-n // page) for n in keys]
    for made in (lengths._pages_of_few(page), lengths._pages_of_many(page)):
        assert [t.dtype for t in made] == [torch.int32] * 3
        assert made[0].tolist() == [sum(counts[:i]) for i in range(len(keys) + 1)]
        assert made[1].tolist() == counts
        assert made[2].tolist() == [n - (c - 1) * page if n else 0 for n, c in zip(keys, counts)]


@pytest.mark.parametrize("rows", [5, FEW + 6])
def test_a_table_cut_out_of_a_larger_one(rows: int) -> None:
    """Engines hand over a slice of a table for the longest context there may be; rows are not one after another."""
    whole = torch.randint(1, 1000, (rows, 12), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    keys = [(7 * i) % 33 + 1 for i in range(rows)]
    for table in (whole[:, :9], whole[:, ::2].repeat(1, 2)[:, 1:10], whole[:1, :9].expand(rows, 9)):
        csr = Batch([1] * rows, keys, block_table=table).csr(4)
        assert csr.indices.tolist() == [page for row, n in zip(table, keys) for page in row[: -(-n // 4)].tolist()]
