"""Fused infer attention of torch_npu, on A2, A3 and A5: paged, ragged, and absorbed MLA.

Conventions: everything is packed (``TND``). Query lengths are a host list, cumulative without the leading 0. Key
lengths are a host list too: plain over pages, cumulative over keys in memory (vllm-ascend, SGLang and dlinfer all call
it so; the operator's page says cumulative and is silent about pages). The scale defaults to 1.0 and the number of heads
to 1, so both are always given. Two values come back always; LSE is natural log, ``(tokens, heads, 1)``.

Masks: causality is ``sparse_mode=3``, aligned to the bottom right; a window is ``sparse_mode=4``, where ``pre_tokens``
counts the keys before the query's own (its page; SGLang passes W - 1, vllm-ascend W: one of them is off by one). Both
want one mask of 2048 x 2048 whatever the sizes. Neither wants anything else: encoders and cross attention have mode 0.

Sources: op-plugin npu_fused_infer_attention_score.md and _v2.md (517f2e7); vllm-ascend 182b75e attention_v1.py,
mla_v1.py; SGLang 0.5.23 ascend_backend.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import blind_tokens, load
from attn_core.errors import BadInputError
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_ascend.backends import TORCH_NPU

MASK_SIZE = 2048
ALL = 2147483647
"""``pre_tokens`` without a window."""


@dataclass(frozen=True)
class Names:
    """How one version of the operator spells what all versions take."""

    operator: str
    query_lens: str
    key_lens: str
    heads: str
    scale: str
    lse: str


V1 = Names(
    "npu_fused_infer_attention_score", "actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale",
    "softmax_lse_flag",
)  # fmt: skip
V2 = Names(
    "npu_fused_infer_attention_score_v2", "actual_seq_qlen", "actual_seq_kvlen", "num_query_heads", "softmax_scale",
    "return_softmax_lse",
)  # fmt: skip
"""Has sinks, and is what engines call for MLA."""


class Lists:
    """One role's rows of one step: the keywords that change from step to step."""

    __slots__ = ("blind", "changing")

    changing: dict[str, Any]
    blind: Tensor | None
    """Tokens of rows without keys, int64, on the device; None where every row has some."""

    def fill(self, batch: Batch, names: Names, *, paged: bool) -> None:
        self.blind = None
        self.changing = {names.query_lens: batch.cu_query_lens[1:].tolist()}
        if paged:
            self.changing[names.key_lens] = batch.kv_lens.tolist()
            self.changing["block_table"] = batch.block_table
        else:
            self.changing[names.key_lens] = batch.cu_kv_lens[1:].tolist()
            self.blind = blind_tokens(batch)


def fixed(b: Binding, names: Names) -> dict[str, Any]:
    """The keywords that never change."""
    given: dict[str, Any] = {
        names.heads: b.num_heads, names.scale: b.scale, "num_key_value_heads": b.num_kv_heads, "input_layout": "TND",
    }  # fmt: skip
    if not b.spec.causal:
        return {**given, "sparse_mode": 0}
    above = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=b.torch_device).triu_(1)
    window = b.sliding_window
    band = {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tokens": window - 1, "next_tokens": 0}
    return {**given, "atten_mask": above, **band}


def bind(b: Binding) -> Kernels:
    names = V2 if b.spec.sinks or b.form == "absorbed" else V1
    attend = load(TORCH_NPU, "torch_npu", names.operator)
    if b.form == "absorbed":
        return _absorbed(b, names, attend)
    if b.form == "materialised" or b.kv_layout is None:
        return _ragged(b, names, attend)
    return _paged(b, names, attend)


def prepare_sinks(sinks: Tensor) -> Tensor:
    return sinks.to(torch.bfloat16).contiguous()


def _paged(b: Binding, names: Names, attend: Any) -> Kernels:
    step_of, always = attrgetter(b.role), {**fixed(b, names), "block_size": b.page_size}
    heads_first, lse_flag = b.kv_layout == "HND", names.lse

    def plan(batch: Batch, *, capture: Capture | None = None, out: Lists | None = None) -> Lists:
        step = Lists() if out is None else out
        step.fill(batch, names, paged=True)
        return step

    def views(kv_cache: Any) -> tuple[Tensor, Tensor]:
        """HND as it is; NHD as ``(pages, page size, kv heads * width)``."""
        k, v = kv_cache.data
        if not (k.is_contiguous() and v.is_contiguous()):
            raise BadInputError(
                f"torch_npu reads pages that lie closely packed; this cache has strides {k.stride()} and {v.stride()}"
            )
        made = kv_cache.memo["ascend"] = (k, v) if heads_first else (k.flatten(2), v.flatten(2))
        return made

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        keys, values = kv_cache.memo.get("ascend") or views(kv_cache)
        more = {lse_flag: return_lse} if sinks is None else {lse_flag: return_lse, "learnable_sink": sinks}
        o, lse = attend(q.contiguous(), keys, values, **always, **step_of(plan).changing, **more)
        return (o, lse.squeeze(-1)) if return_lse else o

    return Kernels(plan=plan, call=call, prepare_sinks=prepare_sinks)


def _ragged(b: Binding, names: Names, attend: Any) -> Kernels:
    """Keys in memory: encoders, and materialised MLA."""
    step_of, always, lse_flag = attrgetter(b.role), fixed(b, names), names.lse

    def plan(batch: Batch, *, capture: Capture | None = None, out: Lists | None = None) -> Lists:
        step = Lists() if out is None else out
        step.fill(batch, names, paged=False)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        more = {lse_flag: return_lse} if sinks is None else {lse_flag: return_lse, "learnable_sink": sinks}
        o, lse = attend(q.contiguous(), k.contiguous(), v.contiguous(), **always, **step.changing, **more)
        if not return_lse:
            return o
        lse = lse.squeeze(-1)
        if step.blind is not None:  # what is left in rows without keys is not stated
            o[step.blind], lse[step.blind] = 0, -torch.inf
        return o, lse

    return Kernels(plan=plan, call=call, prepare_sinks=prepare_sinks)


def _absorbed(b: Binding, names: Names, attend: Any) -> Kernels:
    """The latent cache is key and value at once; the rotary parts of q and k go by names of their own. No LSE."""
    step_of, always = attrgetter(b.role), {**fixed(b, names), "block_size": b.page_size}

    def plan(batch: Batch, *, capture: Capture | None = None, out: Lists | None = None) -> Lists:
        step = Lists() if out is None else out
        step.fill(batch, names, paged=True)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        (q_latent, q_rope), (latent, rope) = q, kv_cache.data
        return attend(
            q_latent.contiguous(), latent, latent, query_rope=q_rope.contiguous(), key_rope=rope,
            **always, **step_of(plan).changing,
        )[0]  # fmt: skip

    return Kernels(plan=plan, call=call)
