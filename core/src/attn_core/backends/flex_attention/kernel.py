"""Bind functions of flex_attention: per sequence, fetch k and v, then one call with the group's mask and scores.

The compiler makes a new kernel for every kind of tensor it meets, and a view that starts inside its storage is another
kind than one that starts where it does. So what goes in always starts at 0: q is copied, keys begin with a page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from attn_core.backends.flex_attention.rules import block_mask, mask_mod, score_mod
from attn_core.backends.torch_native.sources import KV, PagedReader, Pages, RaggedReader, Scratch, Shape, narrowed
from attn_core.backends.torch_native.tiles import Rules
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Capture

COMPILER = {"cpu": "eager"}
"""torch.compile backend by device type, ``inductor`` elsewhere."""


def bind_paged(b: Binding) -> Kernels:
    """Decode and prefill alike: the cache holds the new tokens already."""
    if b.page_size is None or b.kv_dtype is None or b.kv_layout is None:
        raise ValueError("paged attention needs a group with a KV cache")
    page_size, layout, storage = b.page_size, b.kv_layout, b.kv_dtype
    shape = _shape(b)

    def step() -> _Step:
        scratch = Scratch(b.torch_device)
        return _Step(PagedReader(layout, page_size, storage, shape, scratch), RaggedReader(shape, b.dtype, scratch))

    return _kernels(b, step, paged=True)


def bind_encode(b: Binding) -> Kernels:
    """Ragged k and v, no cache."""
    shape = _shape(b)
    return _kernels(b, lambda: _Step(None, RaggedReader(shape, b.dtype, Scratch(b.torch_device))), paged=False)


def _shape(b: Binding) -> Shape:
    """float32 on CPUs: there scores are taken in the inputs' dtype, and half precision loses digits and time."""
    widths = (b.head_dim, b.v_head_dim)
    dtype = torch.float32 if b.torch_device.type == "cpu" else b.dtype
    return Shape(
        heads=b.num_kv_heads, widths=widths, joined=False, kernel_widths=widths, v_width=b.v_head_dim, lanes=0,
        dtype=dtype,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sequence:
    q0: int
    q1: int
    k0: int
    """First key that anybody sees; for ragged keys in the packed k and v."""
    k1: int
    pages: Pages | None
    mask: Any
    """BlockMask; None when all queries see all of ``k0:k1``."""
    change: Any
    """Score function or None."""


@dataclass(slots=True)
class _Step:
    paged: PagedReader | None
    ragged: RaggedReader
    sequences: list[_Sequence] = field(default_factory=list)


def _kernels(b: Binding, new_step: Callable[[], _Step], *, paged: bool) -> Kernels:
    rules = Rules(causal=b.spec.causal, window=b.sliding_window, chunk=b.spec.attention_chunk)
    cap, device, page = b.spec.logit_softcap, b.torch_device, (b.page_size if paged else None) or 1
    softcap = None if cap is None else torch.tensor([cap], device=device)
    slopes = None if b.alibi_slopes is None else torch.tensor(b.alibi_slopes, device=device)
    own_plan, compute, heads, width = attrgetter(b.role), _shape(b).dtype, b.num_heads, b.v_head_dim
    has_sinks, (attend, attend_lse) = b.spec.sinks, _attend(b)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> _Step:
        step: _Step = new_step() if out is None else out
        queries, lens = batch.lengths.queries, batch.lengths.keys
        positions = [m - n if rules.causal else 0 for n, m in zip(queries, lens)]
        starts = [max(0, min(rules.keys(p, m)[0], m - 1)) // page * page for p, m in zip(positions, lens)]
        ends = [max(s, rules.keys(p + n - 1, m)[1]) for p, n, m, s in zip(positions, queries, lens, starts)]
        shifts = torch.tensor([positions, starts], dtype=torch.int32)
        shifts[0] -= shifts[1]
        shift_of, start_of = shifts.to(device).unbind()
        if step.paged is not None:
            step.paged.reserve(max(e - s for s, e in zip(starts, ends)))
        step.sequences = []
        token = key = 0
        for row, (n, m, p, k0, k1) in enumerate(zip(queries, lens, positions, starts, ends)):
            mask, shift = None, shift_of[row : row + 1].clone()
            if k1 > k0 and not rules.keys(p, m) == rules.keys(p + n - 1, m) == (k0, k1):
                sees = mask_mod(rules, shift, start_of[row : row + 1].clone())
                mask = block_mask(rules, p, n, k0, k1, sees, device)
            pages = None
            if step.paged is not None and batch.block_table is not None:
                pages = step.paged.prepare(batch.block_table[row], k0, k1)
            change = score_mod(softcap, slopes, shift)
            at = key if pages is None else 0
            step.sequences.append(_Sequence(token, token + n, at + k0, at + k1, pages, mask, change))
            token, key = token + n, key + m
        return step

    def call(
        q: Tensor, k: Any, v: Any, kv_cache: KVCache | None, plan: Any, *,
        sinks: Tensor | None = None, indices: Any = None, bias: Any = None,
        out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: _Step = own_plan(plan)
        out = q.new_empty(q.shape[0], heads, width) if out is None else out
        lse = torch.empty(q.shape[0], heads, device=q.device) if return_lse else None
        sources: Any = None if step.paged is None or kv_cache is None else step.paged.sources(kv_cache)
        for seq in step.sequences:
            where = slice(seq.q0, seq.q1)
            if seq.k1 == seq.k0:
                out[where] = 0
                if lse is not None:
                    lse[where] = float("-inf")
                continue
            kv = _fetched(step, seq, sources, k, v)
            rows = q[where].to(compute).transpose(0, 1).unsqueeze(0).clone(memory_format=torch.contiguous_format)
            given = (rows, *kv, seq.change, seq.mask)
            taken = sinks if has_sinks else None
            if lse is None and taken is None:
                out[where] = attend(*given)[0].transpose(0, 1)
                continue
            o, aux = attend_lse(*given)
            o, sums = o[0].transpose(0, 1), aux.lse[0].T
            if taken is not None:
                o = o * torch.sigmoid(sums - taken).unsqueeze(-1)
                sums = torch.where(sums == float("-inf"), sums, torch.logaddexp(sums, taken))
            out[where] = o
            if lse is not None:
                lse[where] = sums
        return out if lse is None else (out, lse)

    return Kernels(plan=plan, call=call)


def _fetched(step: _Step, seq: _Sequence, sources: Any, k: Any, v: Any) -> KV:
    """The sequence's k and v, ``(1, kv heads, keys, width)``."""
    if step.paged is None or seq.pages is None:
        found = step.ragged.load((k, v), seq.k0, seq.k1)
        return found[0].contiguous(), found[1].contiguous()
    step.paged.load(sources, seq.pages)
    return narrowed(seq.pages.room.kv, 0, seq.k1 - seq.k0)


def _attend(b: Binding) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The call without and with log-sum-exp, each compiled on first use."""
    flex, aux, scale, gqa = flex_attention, AuxRequest(lse=True), b.scale, b.num_heads != b.num_kv_heads
    compiler = COMPILER.get(b.torch_device.type, "inductor")

    def attend(q: Tensor, k: Tensor, v: Tensor, change: Any, mask: Any) -> Any:
        return flex(q, k, v, change, mask, scale, gqa)

    def attend_lse(q: Tensor, k: Tensor, v: Tensor, change: Any, mask: Any) -> Any:
        return flex(q, k, v, change, mask, scale, gqa, return_aux=aux)

    def compiled(f: Any) -> Any:
        """With code of its own: the compiler counts recompilations per code object, and several groups (or models) in
        one process would exhaust its limit together."""
        own = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        return torch.compile(own, dynamic=True, backend=compiler)

    return compiled(attend), compiled(attend_lse)
