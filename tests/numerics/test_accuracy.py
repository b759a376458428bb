"""How far results are from float64 at sizes people run, against what torch's own attention manages."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, Lengths, bind, step

from attn_core.spec import AttentionSpec
from attn_core.testing.compare import ulp

CASES = {
    "decode 4k": Lengths((1,), (4096,)),
    "decode 1k": Lengths((1,), (1024,)),
    "prompt 1k": Lengths((1024,), (1024,)),
    "chunk of 64 after 2k": Lengths((64,), (2112,)),
}


def by_torch(s):
    """The same step by torch's math path, in the same dtype: what 'as good as torch' means."""
    k, v = (t.reshape(-1, *t.shape[2:])[_slots(s)] for t in s.cache.data)
    group = s.group.spec.group_size
    q, k, v = (t.transpose(0, 1)[None] for t in (s.q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    n, m = q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(q, k, v, seen)[0][0].transpose(0, 1)


def _slots(s):
    position = torch.arange(int(s.batch.kv_lens[0]))
    return s.batch.block_table[0][position // 16].long() * 16 + position % 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_error_is_that_of_torch(case, dtype):
    s = step(bind(AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype=dtype), page_size=16), CASES[case])
    error = lambda o: float((o.double() - want).abs().max())  # noqa: E731
    got, (want, _) = s.run(), s.want()
    if dtype == "float32":
        assert error(got) <= 2e-5
    else:
        two_ulps = 2 * float(ulp(want.abs().max(), DTYPES[dtype]))
        assert error(got) <= max(1.5 * error(by_torch(s)), two_ulps)


@pytest.mark.parametrize("fields", [{"sinks": True}, {"logit_softcap": 30.0}, {"sliding_window": 1024}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_cost_no_accuracy(fields, dtype):
    """Within 1.5 units in the last place of each row's largest value, which is what plain attention keeps to."""
    s = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype=dtype, **fields)
    step(bind(s, lse=True, page_size=16), Lengths((1, 1, 40), (4096, 300, 1000))).check(ulps=1.5)
