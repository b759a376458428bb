"""FlashInfer's paged and ragged wrappers: fa2 and fa3; over ragged keys also CUTLASS and cuDNN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import by_shape, finish, put, seen, sequence
from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS, FP8, base2, check_workspace, dtype_of, host_ints, nhd
from simulators.cuda_flashinfer_planned import (
    Check,
    check_cudnn,
    check_cutlass,
    check_fa2,
    check_fa3,
    check_room,
    check_single_tokens,
)
from simulators.cuda_flashinfer_variants import Variant, named_without_width
from simulators.flash import check_index, keys_of_pages, keys_of_rows, lengths_of

NAN = float("nan")


class Planned:
    """What the wrappers have in common."""

    where = "plan"
    backends = "paged_backends"
    """The limit that lists them."""
    known: Mapping[str, Check] = {"fa2": check_fa2, "fa3": check_fa3}
    """Those this stand-in knows."""

    def __init__(self, a: SimpleNamespace) -> None:
        self.backend, self.layout = a.backend, a.kv_layout
        FACTS.require(self.backends, a.backend, type(self).__name__)
        if a.backend == "auto":
            raise Misuse(f"{type(self).__name__}: backend='auto' leaves the kernel to rules that nobody recorded")
        if a.backend not in self.known:
            raise NotImplementedError(f"{type(self).__name__}: this stand-in does not know {a.backend}")
        self.variant = None if a.jit_args is None else Variant(a.backend, a.jit_args, a.jit_kwargs)
        nhd(torch.empty(1, 1, 1, 1), a.kv_layout)
        self.workspace, self.graph = a.float_workspace_buffer, a.use_cuda_graph
        self.device = self.workspace.device
        self.planned: SimpleNamespace | None = None

    def take(self, a: SimpleNamespace) -> None:
        """Facts that both plans have."""
        self.head_dims = (a.head_dim_qk, a.head_dim_vo or a.head_dim_qk)
        self.q_dtype = dtype_of(a.q_data_type)
        self.kv_dtype = self.q_dtype if a.kv_data_type is None else dtype_of(a.kv_data_type)
        FACTS.require("dtype", str(self.q_dtype).removeprefix("torch."), self.where)
        self.known[self.backend](self.where, a, self.head_dims, self.kv_dtype == self.q_dtype)
        if a.pos_encoding_mode != "NONE" or a.num_qo_heads % a.num_kv_heads:
            raise Refused(f"{self.where}: no position encoding, and kv heads divide query heads")
        if self.variant is not None:
            self.variant.check_plan(self.where, a, (self.q_dtype, self.kv_dtype), self.head_dims)
        self.planned = a

    def check_q(self, a: SimpleNamespace, k_dtype: torch.dtype) -> None:
        p = self.planned
        if p is None:
            raise Refused("run() before plan()")
        if (a.q.dtype, k_dtype) != (self.q_dtype, self.kv_dtype):
            raise Refused(f"run: q and k are {a.q.dtype}, {k_dtype}; planned {self.q_dtype}, {self.kv_dtype}")
        if tuple(a.q.shape) != (self.edges[-1][1], p.num_qo_heads, self.head_dims[0]):
            raise Refused(f"run: q is {tuple(a.q.shape)}; planned {self.edges[-1][1]} tokens, {p.num_qo_heads} heads")
        check_workspace("run", self.workspace, a.q.device)

    edges: list[tuple[int, int]]


class Paged(Planned):
    """BatchPrefillWithPagedKVCacheWrapper."""

    where = "BatchPrefillWithPagedKVCacheWrapper.plan"

    def __init__(self, a: SimpleNamespace) -> None:
        super().__init__(a)
        self.buffers = a
        if a.use_cuda_graph:
            names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
            if any(not isinstance(getattr(a, n), Tensor) for n in names):
                raise Refused(f"{self.where}: use_cuda_graph needs {', '.join(names)}")
            self.most_rows: int | None = None

    def plan(self, a: SimpleNamespace) -> None:
        batch = a.qo_indptr.shape[0] - 1
        offsets = host_ints(self.where, "qo_indptr", a.qo_indptr, (None,))
        pages = host_ints(self.where, "paged_kv_indptr", a.paged_kv_indptr, (batch + 1,))
        last = host_ints(self.where, "paged_kv_last_page_len", a.paged_kv_last_page_len, (batch,))
        check_index(self.where, "paged_kv_indices", a.paged_kv_indices, self.device, (pages[-1],))
        self.take(a)
        self.edges = list(itertools.pairwise(offsets))
        self.pages = list(itertools.pairwise(pages))
        self.lengths = [max(e - b - 1, 0) * a.page_size + n * (e > b) for (b, e), n in zip(self.pages, last)]
        self.indices = a.paged_kv_indices
        self.mask = a.custom_mask
        if a.packed_custom_mask is not None:
            raise NotImplementedError("this stand-in packs no masks")
        if self.mask is not None and self.mask.numel() != sum(
            (e - b) * m for (b, e), m in zip(self.edges, self.lengths)
        ):
            raise Misuse(f"{self.where}: the custom mask has {self.mask.numel()} elements: others are read")
        if self.graph:
            self._into_buffers(a, batch, pages[-1])

    def _into_buffers(self, a: SimpleNamespace, batch: int, pages: int) -> None:
        b = self.buffers
        self.most_rows = self.edges[-1][1] if self.most_rows is None else self.most_rows
        if batch != b.qo_indptr_buf.shape[0] - 1 or self.edges[-1][1] > self.most_rows:
            raise Refused(f"{self.where}: a captured wrapper keeps its batch size and number of rows")
        if pages > b.paged_kv_indices_buf.shape[0]:
            raise Refused(f"{self.where}: more pages than the buffer holds")
        b.paged_kv_indices_buf[:pages].copy_(a.paged_kv_indices)
        self.indices = b.paged_kv_indices_buf
        if self.mask is None and b.custom_mask_buf is not None:
            raise Misuse(f"{self.where}: a wrapper with a mask buffer reads it, and this plan filled none")
        if self.mask is not None and not isinstance(b.custom_mask_buf, Tensor):
            raise Refused(f"{self.where}: custom_mask_buf must be a tensor in CUDA graph mode")
        if self.mask is not None and b.custom_mask_buf.numel() * 8 < self.mask.numel():
            raise Refused(f"{self.where}: the mask does not fit its buffer")

    def run(self, a: SimpleNamespace) -> Any:
        cache = a.paged_kv_cache if isinstance(a.paged_kv_cache, tuple) else a.paged_kv_cache.unbind(1)
        k_cache, v_cache = (nhd(t, self.layout) for t in cache)
        self.check_q(a, k_cache.dtype)
        p = self.planned
        assert p is not None
        if k_cache.shape[1] != p.page_size or (k_cache.shape[3], v_cache.shape[3]) != self.head_dims:
            raise Misuse(f"run: a cache of {tuple(k_cache.shape)} was planned with pages of {p.page_size}")
        if a.window_left not in (None, p.window_left):
            raise AssertionError("window_left differs from the planned one")
        fp8 = k_cache.dtype in FP8
        scale = self.head_dims[0] ** -0.5 if p.sm_scale is None else p.sm_scale
        sinks = None
        if self.variant is not None:
            sinks, scale = self.variant.arguments(a.args, a.q, p.sm_scale)
        for name in ("q_scale", "k_scale"):
            given = getattr(a, name)
            if isinstance(given, Tensor):
                raise Misuse(f"run: {name} as a tensor waits for the device")
            scale = scale if given is None else scale * given
        if fp8 and (a.k_scale is None or a.v_scale is None):
            pass  # taken for 1.0
        tables = [self.indices[b:e] for b, e in self.pages]
        keys = [keys_of_pages("run", k_cache, v_cache, t[None], [n])[0] for t, n in zip(tables, self.lengths)]
        masks = [None] * len(keys)
        if self.mask is not None:
            counts = [(e - b) * m for (b, e), m in zip(self.edges, self.lengths)]
            parts = self.mask.cpu().split(counts)
            masks = [x.view(e - b, m) for x, (b, e), m in zip(parts, self.edges, self.lengths)]
        parts = []
        for (b, e), (k, v), mask in zip(self.edges, keys, masks):
            visible = seen(e - b, k.shape[0], causal=p.causal and mask is None, left=p.window_left, mask=mask)
            cap = p.logits_soft_cap or 0.0
            parts.append(sequence(a.q[b:e], k, v, visible, scale=scale, softcap=cap, sinks=sinks))
        out, lse = finish(parts, a.q)
        if a.v_scale is not None and a.v_scale != 1.0:
            out = out * a.v_scale
        if a.lse_base != "log2" or a.lse_layout != "NH":
            raise NotImplementedError("this stand-in gives LSE in base 2 and NH")
        if self.backend == "fa2":
            by_shape("run", out=a.out)
        out = put(a.out, out)
        return (out, base2(lse)) if a.return_lse else out


class WithSinks(Paged):
    """BatchAttentionWithAttentionSinkWrapper: the paged wrapper, made with a variant of FlashInfer's own naming."""

    def __init__(self, a: SimpleNamespace) -> None:
        windowed = {"use_sliding_window": a.window_left >= 0}
        more = {"jit_args": named_without_width(a), "jit_kwargs": windowed, "variant_owns_mask": False}
        super().__init__(SimpleNamespace(**vars(a), **more))

    def plan(self, *args: Any, **kwargs: Any) -> None:
        super().plan(self._inherited("plan", args, kwargs))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(self._inherited("run", args, kwargs))

    def _inherited(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
        parent = FACTS.functions[f"flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper.{method}"]
        return SimpleNamespace(**parent.bind(args, kwargs))


class Ragged(Planned):
    """BatchPrefillWithRaggedKVCacheWrapper."""

    where = "BatchPrefillWithRaggedKVCacheWrapper.plan"
    backends = "ragged_backends"
    known: Mapping[str, Check] = {**Planned.known, "cutlass": check_cutlass, "cudnn": check_cudnn}

    def plan(self, a: SimpleNamespace) -> None:
        offsets = host_ints(self.where, "qo_indptr", a.qo_indptr, (None,))
        keys = host_ints(self.where, "kv_indptr", a.kv_indptr, (len(offsets),))
        if a.custom_mask is not None or a.packed_custom_mask is not None:
            raise NotImplementedError("this stand-in knows no masks over ragged keys")
        self.take(a)
        self.edges, self.k_edges = list(itertools.pairwise(offsets)), list(itertools.pairwise(keys))
        if self.backend == "cutlass":
            check_room(self.where, lengths_of(self.edges), a.num_qo_heads)

    def run(self, a: SimpleNamespace) -> Any:
        self.check_q(a, a.k.dtype)
        p = self.planned
        assert p is not None
        for t, width in ((a.k, self.head_dims[0]), (a.v, self.head_dims[1])):
            if tuple(t.shape) != (self.k_edges[-1][1], p.num_kv_heads, width):
                raise Refused(f"run: k or v is {tuple(t.shape)}; planned {self.k_edges[-1][1]} keys")
        if self.backend in ("fa2", "cutlass"):
            by_shape("run", out=a.out)
        if self.backend == "cudnn":
            by_shape("run", q=a.q, k=a.k, v=a.v)
            if self.layout != "NHD" or (a.out is not None and not a.out.is_contiguous()):
                raise Refused("run: cudnn takes NHD and writes contiguous outputs")
            if a.return_lse:
                check_single_tokens("run", lengths_of(self.edges), p.num_qo_heads, p.num_kv_heads)
        scale = self.head_dims[0] ** -0.5 if p.sm_scale is None else p.sm_scale
        parts = []
        for (b, e), (k, v) in zip(self.edges, keys_of_rows("run", a.k, a.v, self.k_edges)):
            visible = seen(e - b, k.shape[0], causal=p.causal, left=p.window_left)
            parts.append(sequence(a.q[b:e], k, v, visible, scale=scale, softcap=p.logits_soft_cap or 0.0))
        out, lse = finish(parts, a.q)
        if self.backend != "cutlass":  # what a row without keys gets is not documented: to be replaced by the caller
            lse[:, [i for (b, e), (kb, ke) in zip(self.edges, self.k_edges) if kb == ke for i in range(b, e)]] = NAN
        out = put(a.out, out)
        return (out, base2(lse)) if a.return_lse else out
