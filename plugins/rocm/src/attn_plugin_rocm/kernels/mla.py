"""AITER's absorbed MLA: token indices, one row of 576 for key and value; decode for 16 to 128 heads in 16s, prefill for
16 or 128.

Conventions: q is contiguous; the output goes to ``o``. Of decode the first thing returned is scratch, the second LSE,
natural log ``(tokens, heads)``, only when asked for; prefill is causal and writes ``o`` as if it were contiguous.
Decode reads row 0 for masked positions, with weight 0: a NaN there would poison every row. Here row 0 lies on the null
page, which holds zeros and is never handed out.

Source: AITER e404860 aiter/mla.py, csrc/py_itfs_cu/asm_mla.cu; SGLang 0.5.23 aiter_backend.py.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor

from attn_core.adapters import Indexed, load, refilled
from attn_core.runtime import Binding, Kernels
from attn_plugin_rocm.backends import AITER


def tokens(kv_cache: Any) -> Tensor:
    """The latent cache as the kernels see pages of one token: ``(tokens, 1, 1, 576)``."""
    made: Tensor | None = kv_cache.memo.get("rocm.mla")
    if made is None:
        rows: Tensor = kv_cache.data[0]
        made = kv_cache.memo["rocm.mla"] = rows.view(-1, 1, 1, rows.shape[-1])
    return made


def bind(b: Binding) -> Kernels:
    attend = load(AITER, "aiter.mla", "mla_decode_fwd")
    step_of, page_size, scale, latent = attrgetter(b.role), b.page_size or 1, b.scale, b.v_head_dim

    plan = refilled(lambda capture: Indexed(page_size, capture))

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], latent)
        _, lse = attend(
            q.contiguous(), tokens(kv_cache), out, step.cu_query, step.indptr, step.indices,
            step.last_page_lens, step.max_query, sm_scale=scale, return_lse=return_lse,
        )  # fmt: skip
        return (out, lse) if return_lse else out

    return Kernels(plan=plan, call=call)


def bind_prefill(b: Binding) -> Kernels:
    attend = load(AITER, "aiter.mla", "mla_prefill_fwd")
    step_of, page_size, scale, latent = attrgetter(b.role), b.page_size or 1, b.scale, b.v_head_dim

    plan = refilled(lambda capture: Indexed(page_size, capture))

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], latent)
        attend(
            q.contiguous(), tokens(kv_cache), out, step.cu_query, step.indptr, step.indices, step.last_page_lens,
            step.max_query, sm_scale=scale,
        )  # fmt: skip
        return out

    return Kernels(plan=plan, call=call)
