"""Decode with its keys cut into stretches, as it runs on several threads: every feature, and what a cut covers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Lengths, bind, mla_spec, spec, step
from test_torch_native import FEATURES
from test_verify_rows import tree

from attn_core.backends.torch_native import splits, steps

LENGTHS = Lengths((1, 1, 1, 1, 9), (190, 5, 64, 1, 17))


@pytest.fixture(params=[2, 5])
def threads(request, monkeypatch):
    """As on a machine with more threads than the tests use, and with stretches of a few keys."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(splits, "LEAST", 3)
    return request.param


def most_stretches(s):
    return max(f.cut.count for seq in s.plan.decode.sequences for fetch in seq.fetches for f in fetch.feeds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_decode(threads, dtype, feature):
    group = bind(spec(dtype=dtype, **FEATURES[feature]), lse=True, page_size=4)
    s = step(group, LENGTHS)
    s.check()
    s.check(lse=False)
    if feature in ("plain", "mha", "mqa", "scale", "alibi", "bias", "odd width"):
        assert most_stretches(s) == threads


@pytest.mark.parametrize("options", [{"kv_layout": "HND"}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8_e4m3"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_caches_that_are_copied_or_gathered_by_heads(threads, options, kv_heads):
    group = bind(spec(num_kv_heads=kv_heads), lse=True, page_size=4, **options)
    step(group, LENGTHS, scales=(0.02, 0.03) if "int8" in options.values() else (1.0, 1.0)).check()


@pytest.mark.parametrize("layout", ["MLA", "MLA_SPLIT"])
@pytest.mark.parametrize("kv_dtype", [None, "fp8_e4m3"])
def test_latents(threads, layout, kv_dtype):
    """One key/value head: without stretches one thread would do all the work."""
    group = bind(mla_spec(), form="absorbed", lse=True, page_size=4, kv_layout=layout, kv_cache_dtype=kv_dtype)
    s = step(group, LENGTHS)
    assert most_stretches(s) == threads
    s.check()


@pytest.mark.parametrize("feature", ["plain", "window", "chunk", "sinks", "alibi", "bias", "narrow v"])
@pytest.mark.parametrize("with_tree", [False, True])
def test_verify_rows(threads, feature, with_tree):
    """Rows that see nothing of a stretch, windows and trees being what they are."""
    group = bind(spec(**FEATURES[feature]), lse=True, page_size=4, verify_width=3, tree_mask=with_tree)
    given = {"tree_mask": tree(3)} if with_tree else {}
    step(group, Lengths((3, 3, 3, 9), (90, 3, 17, 12)), decode_width=3, **given).check()


def test_parts_and_stretches_together(threads, monkeypatch):
    monkeypatch.setattr(steps, "PART_BYTES", 1 << 12)
    group = bind(spec(alibi_slopes=FEATURES["alibi"]["alibi_slopes"]), lse=True, page_size=4)
    s = step(group, LENGTHS)
    assert len(s.plan.decode.sequences[0].fetches) > 1
    s.check()


def test_a_bias_may_hide_all_keys_of_a_stretch_or_of_a_row(threads):
    group = bind(spec(bias=True), lse=True, page_size=4)
    s = step(group, LENGTHS)
    s.extra["bias"][0, :, :, :100] = float("-inf")
    s.extra["bias"][2] = float("-inf")
    s.check()


@given(st.integers(1, 600), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3), st.data())
def test_a_cut_gives_every_key_once(keys, count, first, heads, data):
    made = splits.cut(keys, count, torch.device("cpu"))
    assert 1 <= made.count <= count
    kv = torch.arange(heads * (first + keys + 2)).view(1, heads, -1, 1).float()
    k, v = made.of_keys((kv, kv), first)
    assert torch.equal(k, v)
    assert tuple(k.shape) == (made.count, heads, made.keys, 1)
    mask = torch.randn(1, data.draw(st.sampled_from([1, heads])), 2, keys)
    seen = made.of_mask(mask).expand(made.count, heads, 2, made.keys)
    for h in range(heads):
        for row in range(2):
            got = {}
            for i in range(made.count):
                for j in range(made.keys):
                    if seen[i, h, row, j] != float("-inf"):
                        got.setdefault(int(k[i, h, j, 0]), []).append(float(seen[i, h, row, j]))
            at = [int(x) for x in kv[0, h, first : first + keys, 0]]
            wanted = mask[0, 0 if mask.shape[1] == 1 else h, row].tolist()
            assert got == {key: [value] for key, value in zip(at, wanted)}
