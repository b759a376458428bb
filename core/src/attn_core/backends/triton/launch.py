"""Bind functions of the attention roles: constants worked out once, then per step a list of work, per call a launch."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.backends.triton import config
from attn_core.backends.triton.attend import attend, merge
from attn_core.backends.triton.merge_state import merge_state
from attn_core.backends.triton.schedule import Shape, Work, schedule
from attn_core.backends.triton.widths import parts
from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import Binding, Kernels
from attn_core.runtime.cache import KVCache
from attn_core.runtime.plan import Capture

MERGED_ROWS = 16
"""Rows that one program of ``merge`` joins."""


class Step:
    """What a plan holds: lists of work and room for partial results. A refill keeps the addresses of what is large
    enough; what a captured plan holds is, and it also copies the batch's tensors, whose addresses change."""

    def __init__(self, sizes: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device) -> None:
        """``sizes``: lines of work, partial results, merges; ``tile``: kv heads, rows and width of a partial result."""
        lines, self.partials, merges = sizes
        self.lines = torch.full((max(1, lines), 5), -1, dtype=torch.int32, device=device)
        self.merges = torch.full((max(1, merges), 4), -1, dtype=torch.int32, device=device)
        self.part_lse = torch.empty(self.partials, *tile[:2], dtype=torch.float32, device=device)
        self.part_out = torch.empty(self.partials, *tile, dtype=torch.float32, device=device)
        self.num_lines = self.num_merges = 0
        """Programs per kv head to start."""
        self.kept: dict[str, Tensor] = {}

    def holds(self, work: Work) -> bool:
        return (
            len(work.lines) <= len(self.lines)
            and work.partials <= self.partials
            and len(work.merges) <= len(self.merges)
        )

    def fill(self, work: Work, batch: Batch, capture: Capture | None, page_size: int | None, *, trees: bool) -> None:
        """Copies from pageable memory, which the driver stages before it returns: nothing waits for the device.

        ``trees``: a captured graph masks by trees, so a batch without one gets the causal one.
        """
        self.num_lines, self.num_merges = len(work.lines), len(work.merges)
        self.lines[: self.num_lines].copy_(work.lines, non_blocking=True)
        self.merges[: self.num_merges].copy_(work.merges, non_blocking=True)
        tree = batch.tree_mask
        if capture is not None and trees and tree is None:
            width = batch.decode_width
            tree = torch.ones(width, width, dtype=torch.bool, device=batch.device).tril().expand(batch.num_seqs, -1, -1)
        tree = None if tree is None else tree.contiguous().view(torch.uint8)
        columns = None if capture is None or page_size is None else -(-capture.max_kv_len // page_size)
        table = None if batch.block_table is None or page_size is None else batch.block_table[:, :columns]
        if capture is None:
            self.cu_queries, self.kv_lens = batch.cu_query_lens_device, batch.kv_lens_device
            self.table, self.tree = table, tree
        else:
            self.lines[self.num_lines :, 0].fill_(-1)
            self.merges[self.num_merges :, 0].fill_(-1)
            self.num_lines, self.num_merges = len(self.lines), len(self.merges)
            self.cu_queries = self._keep("cu_queries", batch.cu_query_lens_device)
            self.kv_lens = self._keep("kv_lens", batch.kv_lens_device)
            self.table = None if table is None else self._keep("table", table, columns)
            self.tree = None if tree is None else self._keep("tree", tree)
        self.cu_keys = None if page_size is not None else batch.cu_kv_lens_device
        self.spans = _spans(batch)
        if capture is not None and self.spans is not None:
            raise BadInputError(
                "triton: a captured step has no bidirectional_spans; plan such batches without capture="
            )

    def _keep(self, name: str, now: Tensor, columns: int | None = None) -> Tensor:
        """``now`` at the address it had in the first step, in a table of ``columns``."""
        if name not in self.kept:
            shape = now.shape if columns is None else (now.shape[0], columns)
            self.kept[name] = torch.zeros(shape, dtype=now.dtype, device=now.device)
        kept = self.kept[name]
        (kept if columns is None else kept[:, : now.shape[1]]).copy_(now)
        return kept


def _spans(batch: Batch) -> Tensor | None:
    """int32 ``(tokens, 2)``: the span of keys that each query token is in; (kv_len, 0) for those in none."""
    if batch.bidirectional_spans is None or not any(batch.bidirectional_spans):
        return None
    found = []
    for n, m, spans in zip(batch.lengths.queries, batch.lengths.keys, batch.bidirectional_spans):
        rows = torch.tensor([[m, 0]], dtype=torch.int32).repeat(n, 1)
        for start, end in spans:
            rows[max(0, start - m + n) : max(0, end - m + n)] = torch.tensor([start, end], dtype=torch.int32)
        found.append(rows)
    return torch.cat(found).to(batch.device, non_blocking=True)


def bind_prefill(b: Binding) -> Kernels:
    """Any number of new tokens per sequence. ``form='materialised'``: over ragged k and v, else over pages."""
    return _bind(b, paged=b.form != "materialised", decode=False)


def bind_decode(b: Binding) -> Kernels:
    """One or a few tokens per sequence over pages; ``form='absorbed'``: over the latent cache."""
    return _bind(b, paged=True, decode=True)


def bind_encode(b: Binding) -> Kernels:
    """Ragged attention without a cache."""
    return _bind(b, paged=False, decode=False)


def _bind(b: Binding, *, paged: bool, decode: bool) -> Kernels:
    spec, device, storage = b.spec, b.torch_device, (b.kv_dtype or b.dtype) if paged else b.dtype
    joined = b.form == "absorbed"
    q_parts, v_parts = parts(b.head_dim), parts(b.v_head_dim)
    if joined and q_parts.main != b.v_head_dim:
        raise AttnCoreError(f"triton: absorbed MLA needs a latent width that is a power of two, got {b.v_head_dim}")
    group, topk = b.num_heads // b.num_kv_heads, spec.topk if spec.sparse != "none" else None
    family = config.family(b.device.platform, b.device.arch, b.device.shared_memory_per_block)
    chosen = config.tile(
        family, q_parts, v_parts, joined=joined, itemsize=b.dtype.itemsize, stored=storage.itemsize,
        rows=group if topk is not None else group * b.options.verify_width if decode else None,
    )  # fmt: skip
    reaches = [r for r in (b.sliding_window, spec.attention_chunk) if r is not None]
    reach = min(reaches, default=None)
    shape = Shape(
        group=group,
        block_m=chosen.block_m,
        block_n=chosen.block_n,
        programs=-(-family.programs * units(device, family) // b.num_kv_heads),
        causal=spec.causal,
        reach=reach,
        two_sided=0 if spec.causal or reach is None else max(reaches),
        topk=topk,
        everything=(decode and b.options.tree_mask) or spec.bidirectional_prefix,
        fixed=b.options.deterministic,
    )
    halves = config.in_halves(family, v_parts, joined=joined)
    rest_at = q_parts.main
    if halves:
        q_parts, v_parts = q_parts.halved(), v_parts.halved()
    stages = chosen.stages(paged)
    if spec.bias and b.device.platform == "rocm":
        stages = min(
            stages, 2
        )  # Triton 3.9 fails to schedule a third kind of load over three stages on gfx950, gfx1250
    split_q = joined and b.mla_query == "split"
    quantised = storage.itemsize == 1
    of_merge: dict[str, Any] = {
        "HEADS_KV": b.num_kv_heads, "GROUP": group, "V_WIDTH": b.v_head_dim, "V_MAIN": v_parts.main,
        "V_REST": v_parts.rest, "TOPK": topk or 0, "QUANTISED": quantised, "BLOCK_M": chosen.block_m,
        "enable_fp_fusion": True,
    }  # fmt: skip
    constants: dict[str, Any] = {
        **of_merge, "WIDTH": b.head_dim, "MAIN": q_parts.main, "HALF": v_parts.rest if halves else 0,
        "REST": q_parts.rest, "Q_REST_AT": 0 if split_q else rest_at,
        "K_REST_AT": 0 if joined and b.kv_layout == "MLA_SPLIT" else rest_at,
        "JOINED": joined and not halves, "PAGE": b.page_size if paged else 0, "CAUSAL": spec.causal,
        "WINDOW": b.sliding_window or 0, "CHUNK": spec.attention_chunk or 0,
        "SOFTCAP": float(spec.logit_softcap or 0.0), "BLOCK_N": chosen.block_n, "num_warps": chosen.warps,
        "num_stages": stages,
    }  # fmt: skip
    slopes = None if b.alibi_slopes is None else torch.tensor(b.alibi_slopes, dtype=torch.float32, device=device)
    own_plan, sources = attrgetter(b.role), _sources(b, paged)
    heads, heads_kv, width, v_width, scale = b.num_heads, b.num_kv_heads, b.head_dim, b.v_head_dim, b.scale

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> Step:
        work = schedule(shape, batch.query_lens, batch.kv_lens)
        step: Step | None = out
        if step is None or not step.holds(work):
            sizes = (len(work.lines), work.partials, len(work.merges))
            if capture is not None:
                sizes = shape.capacity(capture.max_seqs, capture.decode_width, capture.max_kv_len)
            step = Step(sizes, (heads_kv, chosen.block_m, v_width), device)
        step.fill(work, batch, capture, b.page_size if paged else None, trees=b.options.tree_mask)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Tensor | None = None, indices: Tensor | None = None, bias: Tensor | None = None,
        out: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step: Step = own_plan(plan)
        q, q_rest = q if split_q else (q, q)
        if q.shape[1] != heads or q.stride(2) != 1 or (q.shape[2] != width and not split_q):
            raise BadInputError(
                f"triton {b.role}: q has shape {tuple(q.shape)} and strides {q.stride()}; it must be (tokens, {heads}, "
                f"{width}) with the last axis contiguous"
            )
        if topk is not None and (indices is None or indices.shape[1] != topk or indices.dtype != torch.int32):
            raise BadInputError(f"triton {b.role}: sparse attention needs indices=, int32 (tokens, {topk}), -1 = none")
        out = q.new_empty(q.shape[0], heads, v_width) if out is None else out
        lse = torch.empty(q.shape[0], heads, dtype=torch.float32, device=q.device) if return_lse else None
        k, k_rest, v, k_strides, v_strides, k_scale, v_scale = sources(kv_cache, k, v)
        bias_strides: tuple[int, ...] = (0, 0, 0)
        if bias is not None:
            bias = bias if bias.stride(3) == 1 else bias.contiguous()
            bias_strides = (*(s if n > 1 else 0 for s, n in zip(bias.stride()[:2], bias.shape[:2])), bias.stride(2))
        k_scale_head, v_scale_head = (0 if t is None or t.dim() == 0 else 1 for t in (k_scale, v_scale))
        attend[(step.num_lines * heads_kv,)](
            q, q_rest, k, k_rest, v, out, lse, step.part_out, step.part_lse,
            step.lines, step.cu_queries, step.kv_lens, step.cu_keys, step.table,
            sinks, slopes, step.tree, bias, step.spans, indices, k_scale, v_scale, scale,
            q.stride(0), q.stride(1), q_rest.stride(0), q_rest.stride(1), *k_strides, *v_strides,
            out.stride(0), out.stride(1), 0 if step.table is None else step.table.stride(0),
            0 if indices is None else indices.stride(0), *bias_strides, k_scale_head, v_scale_head, **constants,
        )  # fmt: skip
        if step.num_merges:
            merge[(step.num_merges * heads_kv * (chosen.block_m // MERGED_ROWS),)](
                step.part_out, step.part_lse, step.merges, step.cu_queries, out, lse, sinks, v_scale, v_scale_head,
                out.stride(0), out.stride(1), BLOCK_R=MERGED_ROWS, **of_merge,
            )  # fmt: skip
        return out if lse is None else (out, lse)

    return Kernels(plan=plan, call=call, merge_state=merge_state)


Sources = tuple[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...], "Tensor | None", "Tensor | None"]
"""k, its rest, v; strides of (page, place, head) of k and its rest, and of v; scales of quantised k and v."""


def _sources(b: Binding, paged: bool) -> Callable[[KVCache | None, Tensor | None, Tensor | None], Sources]:
    """Where keys come from: the call's ragged k and v, or the cache, in any layout that strides can describe."""
    quantised = paged and b.kv_dtype is not None and b.kv_dtype.itemsize == 1

    def ragged(cache: Any, k: Any, v: Any) -> Sources:
        k_strides = (0, k.stride(0), k.stride(1))
        return k, k, v, (*k_strides, *k_strides), (0, v.stride(0), v.stride(1)), None, None

    def heads(cache: Any, k: Any, v: Any) -> Sources:
        k, v = cache.k, cache.v
        scales = (cache.k_scale_t, cache.v_scale_t) if quantised else (None, None)
        return k, k, v, (*k.stride()[:3], *k.stride()[:3]), v.stride()[:3], *scales

    def latent(cache: Any, k: Any, v: Any) -> Sources:
        k, rest = cache.data[0], cache.data[-1]
        scales = (cache.k_scale_t, cache.k_scale_t) if quantised else (None, None)
        return k, rest, k, (*k.stride()[:2], 0, *rest.stride()[:2], 0), (*k.stride()[:2], 0), *scales

    return ragged if not paged else latent if b.form == "absorbed" else heads


def units(device: torch.device, family: config.Family) -> int:
    """Multiprocessors of the device; what the family usually has where the runtime does not say."""
    properties_of: Any = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    properties = None if properties_of is None else properties_of(device)
    return getattr(properties, "multi_processor_count", None) or family.units
