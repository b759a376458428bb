"""Fused infer attention of torch_npu, on A2, A3 and A5: paged, ragged, and absorbed MLA.

Conventions: everything is packed (``TND``). Query lengths are a host list, cumulative without the leading 0. Key
lengths are a host list too: plain over pages, cumulative over keys in memory (vllm-ascend, SGLang and dlinfer all call
it so; the operator's page says cumulative and is silent about pages). The scale defaults to 1.0 and the number of heads
to 1, so both are always given. Two values come back always; LSE is natural log, ``(tokens, heads, 1)``.

Masks: causality is ``sparse_mode=3``, aligned to the bottom right; a window is ``sparse_mode=4``, where ``pre_tokens``
counts the keys before the query's own (its page; SGLang passes W - 1, vllm-ascend W: one of them is off by one). Both
want one mask of 2048 x 2048 whatever the sizes. Neither wants anything else: encoders and cross attention have mode 0.

Decode steps may be captured: their lists are in the graph then, and ``launches`` renews them.

Sources: op-plugin npu_fused_infer_attention_score.md and _v2.md (517f2e7); vllm-ascend 182b75e attention_v1.py,
mla_v1.py; SGLang 0.5.23 ascend_backend.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_core.adapters import blind_tokens, load, refilled
from attn_core.errors import BadInputError
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_ascend.backends import TORCH_NPU
from attn_plugin_ascend.kernels.launches import Launches, runtime

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


class Rows:
    """One role's rows of one step over keys in memory."""

    __slots__ = ("_names", "blind", "changing")

    changing: dict[str, Any]
    """The keywords that change from step to step."""
    blind: Tensor | None
    """Tokens of rows without keys, int64, on the device; None where every row has some."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def fill(self, batch: Batch) -> None:
        query_lens, key_lens = batch.cu_query_lens[1:].tolist(), batch.cu_kv_lens[1:].tolist()
        self.changing = {self._names.query_lens: query_lens, self._names.key_lens: key_lens}
        self.blind = blind_tokens(batch)


class Pages:
    """One role's rows of one step over pages; filling it issues again what graphs captured on its plan."""

    __slots__ = ("_always", "_names", "changing", "keywords", "launches")

    changing: dict[str, Any]
    """The keywords that change from step to step."""
    keywords: dict[str, Any]
    """These and those that never change."""

    def __init__(self, names: Names, always: dict[str, Any], launches: Launches | None) -> None:
        self._names, self._always, self.launches = names, always, launches

    def fill(self, batch: Batch) -> None:
        table: Any = batch.block_table
        query_lens, key_lens = batch.cu_query_lens[1:].tolist(), batch.kv_lens.tolist()
        if self.launches is not None:
            table = self.launches.table(table)
        self.changing = {self._names.query_lens: query_lens, self._names.key_lens: key_lens, "block_table": table}
        self.keywords = {**self._always, **self.changing}
        if self.launches is not None:
            self.launches.again(self.changing)


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
    if b.form == "absorbed":
        return _absorbed(b, names)
    if b.form == "materialised" or b.kv_layout is None:
        return _ragged(b, names)
    return _paged(b, names)


def prepare_sinks(sinks: Tensor) -> Tensor:
    return sinks.to(torch.bfloat16).contiguous()


class OverPages(NamedTuple):
    """The operator over pages, for one role of one group."""

    plan: Callable[..., Pages]
    attend: Callable[..., Any]
    capturing: Callable[[], bool]
    record: Callable[..., tuple[Tensor, Tensor]]
    """``(step, temporary, lasting, lse)``: what ``attend`` does, into the capture that is under way. ``temporary`` and
    ``lasting`` are the call's own keywords; ``temporary`` has the query and what else is made for one call. ``lse`` is
    filled. Returns the output and ``lse``."""


def _over_pages(b: Binding, names: Names) -> OverPages:
    attend = load(TORCH_NPU, "torch_npu", names.operator)
    always = {**fixed(b, names), "block_size": b.page_size}
    if b.role != "decode" or b.graph not in ("decode", "full"):  # never captured: nothing is ever recorded
        return OverPages(refilled(lambda capture: Pages(names, always, None)), attend, lambda: False, attend)
    workspace = load(TORCH_NPU, "torch_npu", f"_{names.operator}_get_max_workspace")
    npu, weak = runtime()
    into, width = attend.out, b.v_head_dim

    def record(step: Pages, temporary: dict[str, Tensor], lasting: dict[str, Any], lse: Tensor) -> Any:
        if step.launches is None:
            raise BadInputError(
                "a graph is being captured on a plan that was made without plan(batch, capture=Capture(...)): its "
                "lengths would stay in the graph for ever; make a plan with capture= for each graph"
            )
        query = temporary["query"]
        outputs = query.new_empty(*query.shape[:2], width), lse
        largest = {**step.changing, names.key_lens: step.launches.longest}
        step.launches.record(into, workspace, outputs, temporary, {**lasting, **always}, step.changing, largest)
        return outputs

    def make(capture: Capture | None) -> Pages:
        return Pages(names, always, None if capture is None else Launches(npu, weak, b.page_size, capture))

    return OverPages(refilled(make), attend, npu.is_current_stream_capturing, record)


def _paged(b: Binding, names: Names) -> Kernels:
    step_of, heads_first, lse_flag = attrgetter(b.role), b.kv_layout == "HND", names.lse
    plan, attend, capturing, record = _over_pages(b, names)

    def views(kv_cache: Any) -> tuple[Tensor, Tensor]:
        """HND as it is; NHD as ``(pages, page size, kv heads * width)``."""
        k, v = kv_cache.data
        if not (k.is_contiguous() and v.is_contiguous()):
            raise BadInputError(
                f"torch_npu reads pages that lie closely packed; this cache has strides {k.stride()} and {v.stride()}"
            )
        made = kv_cache.memo["ascend"] = (k, v) if heads_first else (k.flatten(2), v.flatten(2))
        return made

    def captured(step: Pages, q: Tensor, lasting: dict[str, Any], return_lse: bool) -> tuple[Tensor, Tensor]:
        lse = q.new_empty(*q.shape[:2], 1, dtype=torch.float32) if return_lse else q.new_empty(1)
        return record(step, {"query": q}, lasting, lse)

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        keys, values = kv_cache.memo.get("ascend") or views(kv_cache)
        step, more = step_of(plan), {lse_flag: return_lse}
        if sinks is not None:
            more["learnable_sink"] = sinks
        if capturing():
            o, lse = captured(step, q.contiguous(), {"key": keys, "value": values, **more}, return_lse)
        else:
            o, lse = attend(query=q.contiguous(), key=keys, value=values, **more, **step.keywords)
        return (o, lse.squeeze(-1)) if return_lse else o

    return Kernels(plan=plan, call=call, prepare_sinks=prepare_sinks)


def _ragged(b: Binding, names: Names) -> Kernels:
    """Keys in memory: encoders, and materialised MLA."""
    attend, always = load(TORCH_NPU, "torch_npu", names.operator), fixed(b, names)
    step_of, lse_flag = attrgetter(b.role), names.lse

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

    return Kernels(plan=refilled(lambda capture: Rows(names)), call=call, prepare_sinks=prepare_sinks)


def _absorbed(b: Binding, names: Names) -> Kernels:
    """The latent cache is key and value at once; the rotary parts of q and k go by names of their own. No LSE."""
    step_of = attrgetter(b.role)
    plan, attend, capturing, record = _over_pages(b, names)

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, (q_latent, q_rope), (latent, rope) = step_of(plan), q, kv_cache.data
        q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
        if capturing():
            temporary = {"query": q_latent, "query_rope": q_rope}
            lasting = {"key": latent, "value": latent, "key_rope": rope}
            return record(step, temporary, lasting, q_latent.new_empty(q_latent.shape[0]))[0]
        return attend(query=q_latent, query_rope=q_rope, key=latent, value=latent, key_rope=rope, **step.keywords)[0]

    return Kernels(plan=plan, call=call)
