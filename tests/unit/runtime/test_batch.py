"""A batch that exists is valid: every wrong one is refused by a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_core.errors import BadInputError
from attn_core.runtime import Batch


def table(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(1, rows * columns + 1, dtype=torch.int32).view(rows, columns)


def test_host_facts() -> None:
    b = Batch([1, 1, 5, 3], [9, 1, 5, 11], block_table=table(4, 3), slot_mapping=torch.arange(10))
    assert (b.num_seqs, b.num_tokens, b.num_decode_rows, b.num_decode_tokens) == (4, 10, 2, 2)
    assert (b.max_query_len, b.max_kv_len) == (5, 11)
    assert b.cu_query_lens.tolist() == [0, 1, 2, 7, 10]
    assert b.cu_kv_lens.tolist() == [0, 9, 10, 15, 26]
    for t in (b.query_lens, b.kv_lens, b.cu_query_lens, b.cu_kv_lens, b.kv_lens_device, b.cu_query_lens_device):
        assert t.dtype == torch.int32


def test_lists_and_tensors_read_alike() -> None:
    a = Batch([1, 4], [3, 4])
    b = Batch(torch.tensor([1, 4], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32))
    assert a.kv_lens.tolist() == b.kv_lens.tolist()
    assert a.query_lens.dtype == b.query_lens.dtype


def test_an_engine_may_say_where_decode_rows_end() -> None:
    b = Batch([1, 1, 5, 1], [9, 4, 5, 1], num_decode_rows=1)
    assert (b.num_decode_rows, b.num_decode_tokens) == (1, 1)
    assert b.rest_part is not None
    assert b.rest_part.query_lens.tolist() == [1, 5, 1]
    assert Batch([1, 1], [9, 4], num_decode_rows=0).decode_part is None


def test_encoder_takes_query_lens_for_keys() -> None:
    b = Batch([3, 1, 2], attn_type="encoder_only")
    assert b.kv_lens.tolist() == [3, 1, 2]
    assert b.num_decode_rows == 0, "an encoder has no decode rows, and no order to keep"
    assert b.rest_part is b
    assert b.decode_part is None


def test_cross_lengths_may_be_shorter_than_queries() -> None:
    b = Batch([1, 4], [1500, 2], attn_type="cross", block_table=table(2, 94), slot_mapping=torch.arange(1502))
    assert b.num_decode_rows == 1


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no kv", {"query_lens": [1]}, "needs kv_lens"),
    ("count", {"query_lens": [1, 1], "kv_lens": [1]}, "2 query_lens but 1 kv_lens"),
    ("empty", {"query_lens": [], "kv_lens": []}, "skip a step"),
    ("zero query", {"query_lens": [1, 0], "kv_lens": [1, 4]}, r"query_lens\[1\]=0 must be at least 1"),
    ("zero kv", {"query_lens": [1], "kv_lens": [0]}, r"kv_lens\[0\]=0 must be at least 1"),
    ("kv short", {"query_lens": [1, 5], "kv_lens": [1, 4]}, r"kv_lens\[1\]=4 is smaller than query_lens\[1\]=5"),
    ("order", {"query_lens": [1, 7, 2, 1], "kv_lens": [1, 7, 2, 1]}, r"row 3 is a decode row.*Batch\.order"),
    ("order w", {"query_lens": [3, 4], "kv_lens": [8, 8], "decode_width": 4}, "row 1 is a decode row"),
    ("stated", {"query_lens": [1, 2], "kv_lens": [1, 2], "num_decode_rows": 2}, "1 leading rows have query length 1"),
    ("float", {"query_lens": [1.0], "kv_lens": [1]}, "list of integers"),
    ("huge", {"query_lens": [1], "kv_lens": [2**40]}, "list of integers"),
    ("int64", {"query_lens": torch.tensor([1]), "kv_lens": [1]}, "torch.int32"),
    ("two dims", {"query_lens": torch.ones(1, 1, dtype=torch.int32), "kv_lens": [1]}, r"\(num_seqs,\)"),
    ("device", {"query_lens": torch.ones(1, dtype=torch.int32, device="meta"), "kv_lens": [1]}, "kv_lens_device"),
    ("type", {"query_lens": [1], "kv_lens": [1], "attn_type": "decode"}, "did you mean 'decoder'"),
    ("width", {"query_lens": [1], "kv_lens": [1], "decode_width": 0}, "decode_width=0"),
    ("table rows", {"query_lens": [1], "kv_lens": [1], "block_table": table(2, 3)}, r"\(num_seqs, max_pages\)"),
    ("table dtype", {"query_lens": [1], "kv_lens": [1], "block_table": table(1, 3).long()}, "must be torch.int32"),
    ("table list", {"query_lens": [1], "kv_lens": [1], "block_table": [[1]]}, "block_table is list"),
    ("slot dtype", {"query_lens": [1], "kv_lens": [1], "slot_mapping": torch.zeros(1).int()}, "torch.int64"),
    ("slot count", {"query_lens": [2], "kv_lens": [2], "slot_mapping": torch.zeros(3).long()}, "3 entries for 2 new"),
    ("cross slots", {"query_lens": [2], "kv_lens": [3], "slot_mapping": torch.zeros(4).long(), "attn_type": "cross"},
     "more than the 3 keys"),
    ("bounds", {"query_lens": [1], "kv_lens": [1], "exact": False}, "needs kv_lens_device"),
    ("kv device", {"query_lens": [1], "kv_lens": [1], "kv_lens_device": torch.ones(2, dtype=torch.int32)}, "num_seqs"),
    ("devices", {"query_lens": [1], "kv_lens": [1], "block_table": table(1, 1),
                 "slot_mapping": torch.zeros(1, dtype=torch.int64, device="meta")}, "slot_mapping is on another"),
    ("asked device", {"query_lens": [1], "kv_lens": [1], "block_table": table(1, 1), "device": "meta"}, "on another"),
    ("tree shape", {"query_lens": [2], "kv_lens": [4], "decode_width": 2,
                    "tree_mask": torch.ones(1, 3, 3, dtype=torch.bool)}, r"\(1, 2, 2\)"),
    ("tree self", {"query_lens": [2], "kv_lens": [4], "decode_width": 2,
                   "tree_mask": torch.zeros(1, 2, 2, dtype=torch.bool)}, "diagonal must be True"),
    ("span rows", {"query_lens": [4], "kv_lens": [4], "bidirectional_spans": []}, "for 0 sequences"),
    ("span shape", {"query_lens": [4], "kv_lens": [4], "bidirectional_spans": [[3]]}, r"\(start, end\)"),
    ("span cut", {"query_lens": [4], "kv_lens": [4], "bidirectional_spans": [[(2, 5)]]}, "in one step"),
    ("span overlap", {"query_lens": [4], "kv_lens": [4], "bidirectional_spans": [[(0, 3), (2, 4)]]}, "disjoint"),
    ("narrow", {"query_lens": [1], "kv_lens": [9], "block_table": table(1, 2), "page_size": 4}, "needs 3 pages of 4"),
    ("page id", {"query_lens": [1, 2], "kv_lens": [1, 9], "block_table": table(2, 3), "page_size": 4, "num_pages": 6},
     r"block_table\[1, 2\]=6, but the cache has pages 0 to 5"),
    ("page -1", {"query_lens": [1], "kv_lens": [5], "block_table": -table(1, 2), "page_size": 4}, "0 or more"),
    ("slot range", {"query_lens": [1], "kv_lens": [1], "block_table": table(1, 1), "page_size": 4, "num_pages": 2,
                    "slot_mapping": torch.tensor([8])}, r"holds 8; slots are -1 .* or 0 to 7"),
    ("slot -2", {"query_lens": [1], "kv_lens": [1], "slot_mapping": torch.tensor([-2]), "page_size": 4}, "holds -2"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_batches_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        Batch(**arguments)
    assert str(caught.value).startswith("Batch: ")


def test_unused_table_entries_may_hold_anything() -> None:
    t = torch.tensor([[3, -1, 99], [1, 2, 0]], dtype=torch.int32)
    Batch([1, 1], [4, 12], block_table=t, page_size=4, num_pages=4)
    with pytest.raises(BadInputError, match=r"block_table\[0, 1\]=-1"):
        Batch([1, 1], [5, 12], block_table=t, page_size=4, num_pages=4)


def test_bounds_are_checked_for_width_alone() -> None:
    true = torch.tensor([3], dtype=torch.int32)
    t = torch.tensor([[3, -1]], dtype=torch.int32)
    b = Batch([1], [8], block_table=t, kv_lens_device=true, exact=False, page_size=4, num_pages=4)
    assert b.kv_lens_device is true
    assert b.cu_kv_lens_device.tolist() == [0, 3]
    assert b.max_kv_len == 8
    for form in (b.csr, b.token_indices):
        with pytest.raises(BadInputError, match="exact kv_lens on the host"):
            form(4)


def test_padding_rows_are_legal_at_any_width() -> None:
    b = Batch([4, 4], [20, 1], decode_width=4, block_table=table(2, 2))
    assert b.num_decode_rows == 2
    with pytest.raises(BadInputError, match="smaller than"):
        Batch([4, 4], [20, 2], decode_width=4)


def test_a_batch_is_immutable() -> None:
    b = Batch([1], [1])
    with pytest.raises(AttributeError, match="immutable"):
        b.decode_width = 2


def test_order_is_stable_and_makes_a_legal_batch() -> None:
    query = [5, 1, 2, 1, 9, 1]
    order = Batch.order(query)
    assert order == [1, 3, 5, 0, 2, 4]
    assert Batch.order(torch.tensor(query, dtype=torch.int32)) == order
    assert Batch([query[i] for i in order], [9] * 6).num_decode_rows == 3
    assert Batch.order([2, 1, 2], decode_width=2) == [0, 2, 1]


def test_padded_rows_are_decode_rows_on_the_null_page() -> None:
    mask = torch.ones(1, 2, 2, dtype=torch.bool).tril()
    b = Batch([2], [9], decode_width=2, block_table=table(1, 3), slot_mapping=torch.tensor([7, 8]), tree_mask=mask)
    p = b.padded(3)
    assert (p.query_lens.tolist(), p.kv_lens.tolist()) == ([2, 2, 2], [9, 1, 1])
    assert p.block_table is not None
    assert p.block_table.tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert p.slot_mapping is not None
    assert p.slot_mapping.tolist() == [7, 8, -1, -1, -1, -1]
    assert p.tree_mask is not None
    assert p.tree_mask[2].tolist() == [[True, False], [False, True]]
    assert p.num_decode_rows == 3
    assert p.cu_query_lens.tolist() == [0, 2, 4, 6]
    assert b.padded(1) is b
    for bad, to in ((b, 0), (Batch([3], [3]), 2)):
        with pytest.raises(BadInputError, match="cannot pad"):
            bad.padded(to)


def test_padding_keeps_device_lengths_authoritative() -> None:
    b = Batch([1], [8], block_table=table(1, 2), kv_lens_device=torch.tensor([3], dtype=torch.int32), exact=False)
    assert b.padded(2).kv_lens_device.tolist() == [3, 1]
    assert not b.padded(2).exact


def test_with_pages_shares_what_derives_from_lengths_alone() -> None:
    a = Batch([1, 3], [6, 3], block_table=table(2, 2), slot_mapping=torch.arange(4))
    b = a.with_pages(table(2, 2) + 10, torch.arange(4) + 40)
    assert b.cu_query_lens_device is a.cu_query_lens_device  # made by the view, seen by the origin
    assert b.kv_lens_device is a.kv_lens_device
    assert b.csr(4).indptr is a.csr(4).indptr
    assert b.csr(4).indices.tolist() == [i + 10 for i in a.csr(4).indices.tolist()]
    with pytest.raises(BadInputError, match="3 entries for 4"):
        a.with_pages(table(2, 2), torch.arange(3))
    with pytest.raises(BadInputError, match="needs 2 pages"):
        a.with_pages(table(2, 1), None, page_size=4)


def test_one_kind_of_rows_is_the_batch_itself() -> None:
    decode, prefill = Batch([1, 1], [5, 6]), Batch([4, 2], [5, 6])
    assert decode.decode_part is decode
    assert decode.rest_part is None
    assert prefill.rest_part is prefill
    assert prefill.decode_part is None


def test_parts_carry_their_rows_of_everything() -> None:
    mask = torch.ones(2, 2, 2, dtype=torch.bool)
    b = Batch(
        [2, 2, 3], [6, 2, 3], decode_width=2, block_table=table(3, 2), slot_mapping=torch.arange(7), tree_mask=mask,
        bidirectional_spans=[[(0, 2)], [], [(1, 3)]], kv_lens_device=torch.tensor([6, 2, 3], dtype=torch.int32),
    )  # fmt: skip
    first, rest = b.decode_part, b.rest_part
    assert first is not None
    assert rest is not None
    assert first.slot_mapping is not None
    assert first.slot_mapping.tolist() == [0, 1, 2, 3]
    assert rest.slot_mapping is not None
    assert rest.slot_mapping.tolist() == [4, 5, 6]
    assert rest.block_table is not None
    assert rest.block_table.tolist() == [[5, 6]]
    assert first.tree_mask is mask
    assert rest.tree_mask is None
    assert (first.bidirectional_spans, rest.bidirectional_spans) == ((((0, 2),), ()), (((1, 3),),))
    assert (first.num_decode_rows, rest.num_decode_rows) == (2, 0)
    assert rest.kv_lens_device.tolist() == [3]
    assert rest.cu_query_lens.tolist() == [0, 3]
    assert b.decode_part is first, "made once"


def test_parts_of_cross_attention_have_no_slots() -> None:
    b = Batch([1, 4], [8, 6], attn_type="cross", block_table=table(2, 2), slot_mapping=torch.arange(6))
    assert b.rest_part is not None
    assert b.rest_part.slot_mapping is None


def test_csr_needs_a_table() -> None:
    with pytest.raises(BadInputError, match="has none"):
        Batch([1], [1]).csr(4)


def test_repr_says_what_an_error_needs() -> None:
    assert repr(Batch([1, 4], [3, 4])) == "Batch(decoder, 1 decode rows of 1, 1 others, 5 tokens, longest kv 4, cpu)"
