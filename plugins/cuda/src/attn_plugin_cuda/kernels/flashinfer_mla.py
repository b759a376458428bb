"""FlashInfer's MLA kernels on the latent cache (fa2; fa3 on Hopper, the one that reads fp8 latents).

Conventions: one wrapper per plan; index arrays on the host, page ids on the device; the log-sum-exp is a promise of the
plan, which every run must ask for; a cache in fp8 takes one scale for the latent and the rotary part.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from attn_core.adapters import load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_cuda.backends import FLASHINFER
from attn_plugin_cuda.memory import workspace

MODULE = "flashinfer.mla"


def bind(b: Binding) -> Kernels:
    return _latent(b, "fa2")


def bind_fa3(b: Binding) -> Kernels:
    return _latent(b, "fa3")


def _latent(b: Binding, path: str) -> Kernels:
    make, metadata = load(FLASHINFER, MODULE, "BatchMLAPagedAttentionWrapper", "MLAPlanMetadata")
    wrapper_of, page_size, lse, fp8 = attrgetter(b.role), b.page_size or 1, b.options.lse, b.kv_dtype != b.dtype
    given: dict[str, Any] = {
        "num_heads": b.num_heads, "head_dim_ckv": b.v_head_dim, "head_dim_kpe": b.head_dim - b.v_head_dim,
        "page_size": page_size, "causal": True, "sm_scale": b.scale, "q_data_type": b.dtype,
        "kv_data_type": b.kv_dtype, "query_layout": b.mla_query, "kv_cache_layout": "packed",
        "lse_mode": "basee" if lse else "none", "scale_mode": "kv-per-tensor" if fp8 else "default",
    }  # fmt: skip
    asked = {"return_lse": lse, "return_lse_base_on_e": lse}

    def new(capture: Capture | None) -> Any:
        buffer = workspace(b.torch_device)
        if capture is None:
            return make(buffer, backend=path)
        rows, pages = capture.max_seqs, -(-capture.max_kv_len // page_size)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": b.torch_device}
        return make(
            buffer, use_cuda_graph=True, qo_indptr=torch.zeros(rows + 1, **ints),
            kv_indptr=torch.zeros(rows + 1, **ints), kv_indices=torch.zeros(rows * pages, **ints),
            kv_len_arr=torch.zeros(rows, **ints), backend=path,
        )  # fmt: skip

    def plan(batch: Batch, *, capture: Capture | None = None, out: Any = None) -> Any:
        wrapper = new(capture) if out is None else out
        pages = batch.csr(page_size)
        wrapper.plan(metadata=metadata.csr(batch.cu_query_lens, pages.indptr, pages.indices, batch.kv_lens), **given)
        return wrapper

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        got = wrapper_of(plan).run(query=q, kv_cache=kv_cache.data[0], out=out, **asked)
        return got if return_lse or not lse else got[0]

    def call_fp8(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        scale = kv_cache.k_scale
        got = wrapper_of(plan).run(
            query=q, kv_cache=kv_cache.data[0], out=out, ckv_scale=scale, kpe_scale=scale, **asked
        )
        return got if return_lse or not lse else got[0]

    return Kernels(plan=plan, call=call_fp8 if fp8 else call)
