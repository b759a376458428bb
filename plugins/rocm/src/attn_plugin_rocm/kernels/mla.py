"""AITER's absorbed MLA decode: token indices, one row of 576 for key and value, 16 to 128 heads.

Conventions: q is contiguous; the output goes to ``o``; the first thing returned is scratch, the second LSE, natural log
``(tokens, heads)``, only when asked for. The kernel reads row 0 for masked positions, with weight 0: a NaN there would
poison every row. Here row 0 lies on the null page, which holds zeros and is never handed out.

Source: AITER e404860 aiter/mla.py, csrc/py_itfs_cu/asm_mla.cu; SGLang 0.5.23 aiter_backend.py.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from attn_core.adapters import Indexed, load, refilled
from attn_core.runtime import Binding, Kernels
from attn_plugin_rocm.backends import AITER


def bind(b: Binding) -> Kernels:
    attend = load(AITER, "aiter.mla", "mla_decode_fwd")
    step_of, page_size, scale, latent = attrgetter(b.role), b.page_size or 1, b.scale, b.v_head_dim

    plan = refilled(lambda capture: Indexed(page_size, capture))

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        rows = kv_cache.data[0]
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], latent)
        _, lse = attend(
            q.contiguous(), rows.view(-1, 1, 1, rows.shape[-1]), out, step.cu_query, step.indptr, step.indices,
            step.last_page_lens, step.max_query, sm_scale=scale, return_lse=return_lse,
        )  # fmt: skip
        return (out, lse) if return_lse else out

    return Kernels(plan=plan, call=call)
