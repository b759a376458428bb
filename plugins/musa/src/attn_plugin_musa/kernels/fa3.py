"""FlashAttention-3 as MATE builds it (``mate.mha_interface``), for MP31.

Conventions: windows are (left, right) without the token itself; causality is aligned to the bottom right; LSE is
natural log, (heads, tokens) for packed queries; sinks are bfloat16 (heads,). The result over pages is a fresh tensor.

Sources: MATE v0.2.2 mate/mha_interface.py, mate/jit/attention/fmha/, csrc/mla_pybind.mu.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Paged, Ragged, both_sides, load, refilled
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_plugin_musa.backends import MATE
from attn_plugin_musa.kernels.current import current

MODULE = "mate.mha_interface"
WORKSPACE_BYTES = 128 << 20
"""What MATE's own tests and SGLang give the latent kernel; its size per multiprocessor is not published."""


def bind(b: Binding) -> Kernels:
    if b.form == "absorbed":
        return _absorbed(b)
    if b.form == "materialised" or b.kv_layout is None:
        return _ragged(b)
    return _paged(b)


def prepare_sinks(sinks: Tensor) -> Tensor:
    return sinks.to(torch.bfloat16).contiguous()


class Scheduled(Paged):
    """Adds what MATE's scheduler works out once per step; None where the kernel would drop it."""

    __slots__ = ("metadata",)

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.metadata: Tensor | None = None

    def schedule(self, made: Tensor) -> None:
        if self.capture is None or self.metadata is None:
            self.metadata = made
        else:
            self.metadata.copy_(made)


def _paged(b: Binding) -> Kernels:
    attend, get_metadata = load(MATE, MODULE, "flash_attn_with_kvcache", "get_scheduler_metadata")
    step_of, page_size, on_device = attrgetter(b.role), b.page_size or 1, current(b.torch_device)
    scale, causal, window, softcap = b.scale, b.spec.causal, both_sides(b), b.spec.logit_softcap or 0.0
    scheduled = b.role == "decode" and not b.spec.sinks  # with sinks MATE drops the metadata

    def plan(batch: Batch, *, capture: Capture | None = None, out: Scheduled | None = None) -> Scheduled:
        step = Scheduled(page_size, capture) if out is None else out
        step.fill(batch)
        if scheduled:
            with on_device():
                made = get_metadata(
                    step.rows, step.max_query, step.max_kv, b.num_heads, b.num_kv_heads, b.head_dim,
                    seqused_k=step.kv_lens, qkv_dtype=b.dtype, headdim_v=b.v_head_dim, cu_seqlens_q=step.cu_query,
                    page_size=page_size, causal=causal, window_size=window, has_softcap=softcap > 0,
                )  # fmt: skip
            step.schedule(made)
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, kv_cache.k, kv_cache.v,
            cache_seqlens=step.kv_lens, page_table=step.table, cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query,
            softmax_scale=scale, causal=causal, window_size=window, learnable_sink=sinks, softcap=softcap,
            scheduler_metadata=step.metadata, return_softmax_lse=return_lse,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call, prepare_sinks=prepare_sinks)


def family(b: Binding) -> str:
    """The kernels that serve a ragged call: what ``auto`` would take, named (``_check_valid_asm_input``)."""
    pair = (b.head_dim, b.v_head_dim)
    assembled = pair == (192, 128) or (pair[0] == pair[1] and pair[0] <= 128)
    return "mubin" if assembled and b.spec.logit_softcap is None and not b.spec.sinks else "mutlass"


def _ragged(b: Binding) -> Kernels:
    """Keys in memory: encoders, and materialised MLA."""
    attend = load(MATE, MODULE, "flash_attn_varlen_func")
    step_of, scale, causal = attrgetter(b.role), b.scale, b.spec.causal
    softcap, backend = b.spec.logit_softcap or 0.0, family(b)

    plan = refilled(lambda _: Ragged())

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        got = attend(
            q, k, v, step.cu_query, step.cu_kv, step.max_query, step.max_kv,
            softmax_scale=scale, causal=causal, softcap=softcap, return_softmax_lse=return_lse, backend=backend,
        )  # fmt: skip
        if not return_lse:
            return got
        o, lse = got[0], got[1].T
        step.nothing_seen(o, lse)
        return o, lse

    return Kernels(plan=plan, call=call)


class Latent(Paged):
    """Adds the workspace in which the latent kernel keeps its own plan of the step."""

    __slots__ = ("planned", "workspace")

    def __init__(self, page_size: int, capture: Capture | None, device: torch.device) -> None:
        super().__init__(page_size, capture)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.planned = False
        """Whether the workspace holds this step's plan; the first layer's call makes it. Never taken for granted in a
        captured graph, which must make it in every replay."""

    def fill(self, batch: Batch) -> None:
        super().fill(batch)
        self.planned = False

    def metadata(self) -> tuple[Tensor, bool]:
        known, self.planned = self.planned, self.capture is None
        return self.workspace, known


def _absorbed(b: Binding) -> Kernels:
    """One key/value head: the cache's rotary part is k, its latent part v, and q's latent part goes as qv."""
    attend = load(MATE, MODULE, "flash_attn_with_kvcache")
    step_of, page_size, scale, device = attrgetter(b.role), b.page_size or 1, b.scale, b.torch_device
    latent, split = b.v_head_dim, b.mla_query == "split"

    plan = refilled(lambda capture: Latent(page_size, capture, device))

    def views(kv_cache: Any) -> tuple[Tensor, Tensor]:
        rows = kv_cache.data[0].unsqueeze(2)
        made = kv_cache.memo["musa.fa3"] = (rows[..., latent:], rows[..., :latent])
        return made

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        rope, latents = kv_cache.memo.get("musa.fa3") or views(kv_cache)
        q_latent, q_rope = q if split else (q[..., :latent], q[..., latent:])
        got = attend(
            q_rope, rope, latents, qv=q_latent,
            cache_seqlens=step.kv_lens, page_table=step.table, cu_seqlens_q=step.cu_query, max_seqlen_q=step.max_query,
            softmax_scale=scale, causal=True, scheduler_metadata=step.metadata(), return_softmax_lse=return_lse,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call)
