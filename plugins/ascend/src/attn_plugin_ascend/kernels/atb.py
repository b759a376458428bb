"""ATB's paged attention on 310P, over caches in the fractal format (layout ASCEND_NZ). float16.

Steps of one query a row go to ``_npu_paged_attention``, all others to ``_npu_paged_attention_splitfuse_v2``: chunks of
prompts with and without cached keys, and verify rows. Its mask is plain, 2048 x 2048 whatever the sizes, -10000 above
the diagonal, and aligned to the bottom right. Key lengths (``context_lens``, all keys) lie on the device, query lengths
(``seq_len``) on the host; outputs go to ``out``. Key lengths and pages are read when the kernel runs, and the query
lengths of decode rows never change, so decode steps may be captured and replayed as they are.

Sources: op-plugin ops/atb/PagedAttention*.cpp, python/atb/_atb_api_docs.py (limits of "Atlas inference products"),
test_atb_paged_attention_splitfuse_v2.py (on 310P) (517f2e7); vllm-ascend 182b75e _310p/attention/attention_v1.py and
_310p/model_runner_310p.py (graphs).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from attn_core.adapters import Paged, refilled
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_ascend.kernels import nz
from attn_plugin_ascend.kernels.nnal import atb

MASK_SIZE = 2048
MASKED = -10000.0
NORM_COMPRESS = 5
"""``mask_type``: one triangle for all sizes."""


class Step(Paged):
    """One role's rows of one step; key lengths and pages lie on the device."""

    __slots__ = ("_always", "_single", "keywords")

    keywords: dict[str, Any]
    """Those of every step, and those that change."""

    def __init__(self, page_size: int, capture: Capture | None, always: dict[str, Any], *, single: bool) -> None:
        super().__init__(page_size, capture)
        self._always, self._single = always, single

    def fill(self, batch: Batch) -> None:
        super().fill(batch)
        if self.capture is not None:  # padding rows have one key, but no query may come before the first key
            self.kv_lens.clamp_(min=self.capture.decode_width)
        self.keywords = {**self._always, "block_table": self.table, "context_lens": self.kv_lens}
        if not self._single:
            self.keywords["seq_len"] = batch.query_lens


def bind(b: Binding) -> Kernels:
    step_of, page_size, pages = attrgetter(b.role), b.page_size or 0, nz.pages_of(b)
    always: dict[str, Any] = {"num_heads": b.num_heads, "num_kv_heads": b.num_kv_heads, "scale_value": b.scale}
    single = b.role == "decode" and b.options.verify_width == 1
    attend = atb("_npu_paged_attention" if single else "_npu_paged_attention_splitfuse_v2")
    if not single:
        ones = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.float16, device=b.torch_device)
        always |= {"mask": ones.triu_(1).mul_(MASKED), "mask_type": NORM_COMPRESS}

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        keys, values = pages(kv_cache)
        out = q.new_empty(q.shape) if out is None else out
        attend(query=q, key_cache=keys, value_cache=values, **step_of(plan).keywords, out=out)
        return out

    return Kernels(plan=refilled(lambda capture: Step(page_size, capture, always, single=single)), call=call)
