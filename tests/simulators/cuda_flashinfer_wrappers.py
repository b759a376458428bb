"""FlashInfer's paged and ragged wrappers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import finish, put, seen, sequence
from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS, FP8, base2, check_workspace, dtype_of, host_ints, nhd
from simulators.flash import check_index, keys_of_pages, keys_of_rows


class Planned:
    """What the wrappers of fa2 and fa3 have in common."""

    where = "plan"

    def __init__(self, a: SimpleNamespace) -> None:
        self.backend, self.layout = a.backend, a.kv_layout
        FACTS.require("paged_backends", a.backend, type(self).__name__)
        if a.backend == "auto":
            raise Misuse(f"{type(self).__name__}: backend='auto' leaves the kernel to rules that nobody recorded")
        if a.backend not in ("fa2", "fa3"):
            raise NotImplementedError(f"{type(self).__name__}: this stand-in knows fa2 and fa3, not {a.backend}")
        if a.jit_args is not None:
            raise NotImplementedError("this stand-in knows no variants of its own")
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
        FACTS.require("fa2_kv_dtype", str(self.kv_dtype).removeprefix("torch."), self.where)
        if self.backend == "fa3":
            FACTS.require("fa3_head_dims", self.head_dims, self.where)
            if self.kv_dtype != self.q_dtype or a.custom_mask is not None or a.packed_custom_mask is not None:
                raise Refused(f"{self.where}: fa3 takes neither an fp8 cache under 16-bit q nor a custom mask")
            if a.disable_split_kv or a.fixed_split_size is not None:
                raise Misuse(f"{self.where}: fa3 drops disable_split_kv and fixed_split_size")
        else:
            FACTS.require("fa2_head_dim_qk", self.head_dims[0], self.where)
            FACTS.require("fa2_head_dim_vo", self.head_dims[1], self.where)
        if a.pos_encoding_mode != "NONE" or a.num_qo_heads % a.num_kv_heads:
            raise Refused(f"{self.where}: no position encoding, and kv heads divide query heads")
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
            parts.append(sequence(a.q[b:e], k, v, visible, scale=scale, softcap=p.logits_soft_cap or 0.0))
        out, lse = finish(parts, a.q)
        if a.v_scale is not None and a.v_scale != 1.0:
            out = out * a.v_scale
        if a.lse_base != "log2" or a.lse_layout != "NH":
            raise NotImplementedError("this stand-in gives LSE in base 2 and NH")
        out = put(a.out, out)
        return (out, base2(lse)) if a.return_lse else out


class Ragged(Planned):
    """BatchPrefillWithRaggedKVCacheWrapper."""

    where = "BatchPrefillWithRaggedKVCacheWrapper.plan"

    def plan(self, a: SimpleNamespace) -> None:
        offsets = host_ints(self.where, "qo_indptr", a.qo_indptr, (None,))
        keys = host_ints(self.where, "kv_indptr", a.kv_indptr, (len(offsets),))
        if a.custom_mask is not None or a.packed_custom_mask is not None:
            raise NotImplementedError("this stand-in knows no masks over ragged keys")
        self.take(a)
        self.edges, self.k_edges = list(itertools.pairwise(offsets)), list(itertools.pairwise(keys))

    def run(self, a: SimpleNamespace) -> Any:
        self.check_q(a, a.k.dtype)
        p = self.planned
        assert p is not None
        for t, width in ((a.k, self.head_dims[0]), (a.v, self.head_dims[1])):
            if tuple(t.shape) != (self.k_edges[-1][1], p.num_kv_heads, width):
                raise Refused(f"run: k or v is {tuple(t.shape)}; planned {self.k_edges[-1][1]} keys")
        scale = self.head_dims[0] ** -0.5 if p.sm_scale is None else p.sm_scale
        parts = []
        for (b, e), (k, v) in zip(self.edges, keys_of_rows("run", a.k, a.v, self.k_edges)):
            visible = seen(e - b, k.shape[0], causal=p.causal, left=p.window_left)
            parts.append(sequence(a.q[b:e], k, v, visible, scale=scale, softcap=p.logits_soft_cap or 0.0))
        out, lse = finish(parts, a.q)
        unwritten = [i for (b, e), (kb, ke) in zip(self.edges, self.k_edges) if kb == ke for i in range(b, e)]
        lse[:, unwritten] = float("nan")  # not documented: to be replaced by the caller
        out = put(a.out, out)
        return (out, base2(lse)) if a.return_lse else out
