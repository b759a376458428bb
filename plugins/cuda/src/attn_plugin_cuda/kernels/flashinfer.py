"""FlashInfer's paged and ragged wrappers: fa2, fa3 on Hopper; over ragged keys CUTLASS and cuDNN on Blackwell.

Decode runs on the prefill wrapper too: on tensor cores both are one kernel. A wrapper, its workspace and its page
indices belong to one plan. Index arrays go to ``plan`` on the host, where it reads them; page ids lie on the device.

Conventions: windows count the keys to the left; causality is aligned to the bottom right and off unless asked for; LSE
is base 2, (tokens, heads); a custom mask replaces causality, bit by bit per sequence. ``sinks=`` is dropped by these
kernels, so sinks are not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Ragged, left, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.backends_flashinfer import CUDNN_FRONTEND
from attn_plugin_cuda.memory import workspace

MODULE = "flashinfer.prefill"
LN2 = math.log(2)
ROOM, TILE = 131072, 256
"""CUTLASS's plan has so many entries, one per tile of queries, head and sequence, and writes beyond them unchecked."""


def bind(b: Binding) -> Kernels:
    return _bind(b, "fa2")


def bind_fa3(b: Binding) -> Kernels:
    return _bind(b, "fa3")


def bind_cutlass(b: Binding) -> Kernels:
    """CUTLASS, and fa2 for a step that CUTLASS's plan has no room for."""
    heads = b.num_heads

    def path_of(batch: Batch) -> str:
        tiles = sum(-(-n // TILE) for n in batch.lengths.queries)
        return "cutlass" if tiles * heads <= ROOM else "fa2"

    return _ragged(b, ("cutlass", "fa2"), path_of)


def bind_cudnn(b: Binding) -> Kernels:
    load(CUDNN_FRONTEND, "cudnn")  # without it FlashInfer takes binaries of its own, which do less
    return _ragged(b, ("cudnn",), lambda _: "cudnn")


def _bind(b: Binding, path: str) -> Kernels:
    """``path`` is FlashInfer's kernel, named in every wrapper so that none of its own rules decides."""
    if b.form == "materialised" or b.kv_layout is None:
        return _ragged(b, (path,), lambda _: path)
    return paged(b, path)


def planned(b: Binding, path: str) -> dict[str, Any]:
    """What both wrappers' ``plan`` is told in every step."""
    more = {"disable_split_kv": b.options.deterministic} if path == "fa2" else {}
    return {
        "head_dim_vo": b.v_head_dim, "causal": b.spec.causal, "sm_scale": b.scale, "window_left": left(b),
        "logits_soft_cap": b.spec.logit_softcap, "q_data_type": b.dtype, "kv_data_type": b.kv_dtype or b.dtype,
        "non_blocking": True, **more,
    }  # fmt: skip


class Step:
    """A wrapper with its plan for one step."""

    __slots__ = ("masked", "wrapper")

    def __init__(self, wrapper: Any, *, masked: bool) -> None:
        self.wrapper, self.masked = wrapper, masked
        """``masked``: a graph holds the masked kernel, so every step fills the mask."""


def paged(b: Binding, path: str, **own: Any) -> Kernels:
    """Keys in pages. ``own``: what else the wrapper is made with."""
    make = load(FLASHINFER, MODULE, "BatchPrefillWithPagedKVCacheWrapper")
    step_of, page_size, heads, kv_heads = attrgetter(b.role), b.page_size or 1, b.num_heads, b.num_kv_heads
    given, window = planned(b, path), left(b)
    trees = b.role == "decode" and b.options.tree_mask

    def new(batch: Batch, capture: Capture | None) -> Step:
        buffer = workspace(b.torch_device)
        if capture is None:
            return Step(make(buffer, b.kv_layout, backend=path, **own), masked=False)
        rows, pages = capture.max_seqs, -(-capture.max_kv_len // page_size)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": b.torch_device}
        masks: dict[str, Any] = {}
        if trees:
            bits = capture.max_seqs * (capture.decode_width * capture.max_kv_len + 7)
            masks = {
                "custom_mask_buf": torch.zeros(bits // 8 + 1, dtype=torch.uint8, device=b.torch_device),
                "mask_indptr_buf": torch.zeros(rows + 1, **ints),
            }
        wrapper = make(
            buffer, b.kv_layout, use_cuda_graph=True, qo_indptr_buf=torch.zeros(rows + 1, **ints),
            paged_kv_indptr_buf=torch.zeros(rows + 1, **ints), paged_kv_indices_buf=torch.zeros(rows * pages, **ints),
            paged_kv_last_page_len_buf=torch.zeros(rows, **ints), backend=path, **masks, **own,
        )  # fmt: skip
        return Step(wrapper, masked=trees)

    def plan(batch: Batch, *, capture: Capture | None = None, out: Step | None = None) -> Step:
        step = new(batch, capture) if out is None else out
        pages, options = batch.csr(page_size), given
        if step.masked or batch.tree_mask is not None:
            options = {**given, "window_left": -1, "custom_mask": tree_bits(batch, window)}
        step.wrapper.plan(
            batch.cu_query_lens, pages.indptr, pages.indices, pages.last_page_len, heads, kv_heads, b.head_dim,
            page_size, **options,
        )  # fmt: skip
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        got = step_of(plan).wrapper.run(q, kv_cache.data, out=out, return_lse=return_lse)
        return (got[0], got[1] * LN2) if return_lse else got

    def call_fp8(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        got = step_of(plan).wrapper.run(
            q, kv_cache.data, k_scale=kv_cache.k_scale, v_scale=kv_cache.v_scale, out=out, return_lse=return_lse
        )
        return (got[0], got[1] * LN2) if return_lse else got

    return Kernels(plan=plan, call=call if b.kv_dtype == b.dtype else call_fp8)


def tree_bits(batch: Batch, window_left: int) -> Tensor:
    """Which keys each query sees, one bool per query and key, sequence after sequence; flat, on the batch's device.

    The tree mask among a row's new tokens, causality where the batch has none; before them the window.
    """
    width, lens, device = batch.decode_width, batch.kv_lens.long(), batch.device
    counts = lens * width
    total = int(counts.sum())
    ends = counts.cumsum(0)
    keys, starts = lens.to(device, non_blocking=True), (ends - counts).to(device, non_blocking=True)
    row = torch.repeat_interleave(
        torch.arange(len(lens), device=device), counts.to(device, non_blocking=True), output_size=total
    )
    place = torch.arange(total, device=device) - starts[row]
    query, key = place // keys[row], place % keys[row]
    new = key - (keys[row] - width)  # below zero: older than the new tokens
    if batch.tree_mask is None:
        among = new <= query
    else:
        among = batch.tree_mask[row, query, new.clamp(min=0)]
    old = query - new <= window_left if window_left >= 0 else new < 0
    return torch.where(new < 0, old, among)


def _ragged(b: Binding, paths: tuple[str, ...], path_of: Callable[[Batch], str]) -> Kernels:
    """Keys in memory: encoders, and materialised MLA. ``path_of`` names the kernel of a step, one of ``paths``.

    Before cuDNN 9.24 its rows are found by heads times width: they must lie closely packed (cudnn/prefill.py).
    """
    make = load(FLASHINFER, MODULE, "BatchPrefillWithRaggedKVCacheWrapper")
    step_of, heads, kv_heads = attrgetter(b.role), b.num_heads, b.num_kv_heads
    given = {path: {**planned(b, path), "kv_data_type": b.dtype} for path in paths}
    packed = "cudnn" in paths

    def plan(batch: Batch, *, capture: Capture | None = None, out: Rows | None = None) -> Rows:
        step = Rows(workspace(b.torch_device)) if out is None else out
        step.fill(batch)
        path = path_of(batch)
        if path not in step.wrappers:
            step.wrappers[path] = make(step.workspace, "NHD", backend=path)
        step.wrapper = step.wrappers[path]
        step.wrapper.plan(batch.cu_query_lens, batch.cu_kv_lens, heads, kv_heads, b.head_dim, **given[path])
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        if packed:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        got = step.wrapper.run(q, k, v, out=out, return_lse=return_lse)
        if not return_lse:
            return got
        lse = got[1] * LN2
        step.nothing_seen(got[0], lse)
        return got[0], lse

    return Kernels(plan=plan, call=call)


class Rows(Ragged):
    """The ragged wrapper that this step was planned for, of those made so far; they share a workspace."""

    __slots__ = ("workspace", "wrapper", "wrappers")

    wrapper: Any

    def __init__(self, workspace: Tensor) -> None:
        self.workspace, self.wrappers = workspace, dict[str, Any]()
