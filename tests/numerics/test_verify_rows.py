"""Decode rows of several tokens: speculative verify, tree masks, padding rows; and lengths only the device knows."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, MIXED, Lengths, bind, mla_spec, spec, step
from test_torch_native import FEATURES

WIDTH = 3
LENGTHS = Lengths((WIDTH, WIDTH, WIDTH, 9), (30, 3, 17, 12))
SUPPORTED = ["plain", "mqa", "window", "chunk", "softcap", "sinks", "alibi", "bias", "narrow v", "everything"]


def tree(rows, seed=0):
    mask = torch.rand(rows, WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mask | torch.eye(WIDTH, dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", SUPPORTED)
def test_verify_rows(dtype, feature):
    group = bind(spec(dtype=dtype, **FEATURES[feature]), lse=True, page_size=4, verify_width=WIDTH)
    step(group, LENGTHS, decode_width=WIDTH).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", SUPPORTED)
def test_tree_masks(dtype, feature):
    group = bind(spec(dtype=dtype, **FEATURES[feature]), lse=True, page_size=4, verify_width=WIDTH, tree_mask=True)
    s = step(group, LENGTHS, decode_width=WIDTH, tree_mask=tree(3))
    got = s.check()
    causal = step(group, LENGTHS, decode_width=WIDTH).check()
    assert not torch.equal(got[:9], causal[:9])  # the mask mattered


def test_tree_masks_together_with_spans():
    group = bind(
        spec(bidirectional_prefix=True, sliding_window=5), lse=True, page_size=4, verify_width=WIDTH, tree_mask=True
    )
    spans = [[(4, 9)], [], [(10, 17)], [(2, 7)]]
    step(group, LENGTHS, decode_width=WIDTH, tree_mask=tree(3), bidirectional_spans=spans).check()


@pytest.mark.parametrize("layout", ["MLA", "MLA_SPLIT"])
def test_verify_on_the_latent_cache(layout):
    group = bind(
        mla_spec(), form="absorbed", lse=True, page_size=4, kv_layout=layout, verify_width=WIDTH, tree_mask=True
    )
    step(group, LENGTHS, decode_width=WIDTH, tree_mask=tree(3)).check()
    step(group, LENGTHS, decode_width=WIDTH).check()


@pytest.mark.parametrize("width", [1, WIDTH])
@pytest.mark.parametrize("with_tree", [False, True])
def test_padding_rows_change_nothing(width, with_tree):
    """Query length ``decode_width``, kv length 1, page 0, slots -1, as a captured graph pads its batches."""
    group = bind(spec(), lse=True, page_size=4, verify_width=width, tree_mask=with_tree)
    lengths = Lengths((width, width), (30, 7))
    given = {"tree_mask": tree(2)[:, :width, :width]} if with_tree else {}
    s = step(group, lengths, decode_width=width, **given)
    want = s.run()
    tokens = 2 * width
    padded = s.batch.padded(5)
    q, k, v = (torch.cat((t, torch.randn(3 * width, *t.shape[1:]))) for t in (s.q, s.k, s.v))
    got = group.forward(q, k, v, s.cache, group.plan(padded))
    assert torch.equal(got[:tokens], want)
    assert bool(got.isfinite().all())
    assert all(bool((t[0] == 0).all()) for t in s.cache.data)


@pytest.mark.parametrize("make", [spec, mla_spec])
@pytest.mark.parametrize("width", [1, WIDTH])
def test_true_lengths_may_be_known_to_the_device_only(make, width):
    """The host's bounds are larger; plans must follow the device's tensor."""
    group = bind(
        make(),
        lse=True,
        page_size=4,
        host_lengths="bounds",
        verify_width=width,
        form="absorbed" if make is mla_spec else None,
    )
    lengths = Lengths((width, width, 5, 7), (9, 31, 5, 30)) if width > 1 else MIXED
    s = step(group, lengths, bounds=[m + 3 + 4 * i for i, m in enumerate(lengths.kv)], decode_width=width)
    s.check()
