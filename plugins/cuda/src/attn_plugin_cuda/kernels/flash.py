"""FlashAttention as sglang-kernel, vLLM and its own repository build it: one logic, spelt by each package in its way.

fa3 on Hopper from all three, and vLLM's fa2 and fa4. (``flash_attn`` and ``flash_attn.cute`` have other shapes: see
:mod:`fa2` and :mod:`fa4`.)

Conventions of all: windows are (left, right) without the token itself; causality is aligned to the bottom right; LSE is
natural log, (heads, tokens) for packed queries; fa3's sinks are bfloat16 (heads,), fa4's float32; an fp8 cache wants q
in fp8 and answers in bfloat16, with float32 descales (rows, kv heads); MLA runs as q.k over the rotary part plus qv.v
over the latent.

What never changes and what a step brings are keywords, put together in the plan: a call adds the tensors. fa3's
scheduler metadata is computed once per step for this group's own heads, windows and lengths, and lies on its plan.

Sources: sgl_kernel/flash_attn.py of sglang-kernel 0.4.10; vllm_flash_attn/flash_attn_interface.py and cute/interface.py
of vLLM 0.33.0, vllm-project/flash-attention 617264c1 (csrc, hopper); flash-attention 0251105a hopper/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from attn_core.adapters import Paged, Ragged, both_sides, load
from attn_core.runtime import Batch, Binding, Capture, Kernels
from attn_core.spec import Requirement
from attn_plugin_cuda.backends_flash import FLASH_ATTN_3, SGL_KERNEL, VLLM_FA2, VLLM_FA3, VLLM_FA4


@dataclass(frozen=True)
class Package:
    """How one package spells what all of them take."""

    requirement: Requirement
    module: str
    paged: str = "flash_attn_with_kvcache"
    """The function over pages; the one over rows in memory is ``flash_attn_varlen_func`` everywhere."""
    key_lens: str = "cache_seqlens"
    table: str = "page_table"
    latent: str = "qv"
    sinks: str = "sinks"
    ragged_lse: str = "return_softmax_lse"
    version: int | None = None
    """``fa_version``, where one function serves several."""
    tells_longest: bool = False
    """Whether the function over pages is told the longest key length; others go by what the block table can hold."""
    schedules: bool = True
    """Whether it takes scheduler metadata."""
    takes_out: bool = True
    """Whether its functions have ``out`` and sinks."""


SGL = Package(SGL_KERNEL, "sgl_kernel.flash_attn")
UPSTREAM = Package(FLASH_ATTN_3, "flash_attn_interface", ragged_lse="return_attn_probs", takes_out=False)


def vllm(requirement: Requirement, version: int) -> Package:
    return Package(
        requirement, "vllm.vllm_flash_attn", "flash_attn_varlen_func", "seqused_k", "block_table", "q_v", "s_aux",
        version=version, tells_longest=True, schedules=version == 3,
    )  # fmt: skip


def bind_sgl_fa3(b: Binding) -> Kernels:
    return _bind(b, SGL)


def bind_upstream_fa3(b: Binding) -> Kernels:
    return _bind(b, UPSTREAM)


def bind_vllm_fa2(b: Binding) -> Kernels:
    return _bind(b, vllm(VLLM_FA2, 2))


def bind_vllm_fa3(b: Binding) -> Kernels:
    return _bind(b, vllm(VLLM_FA3, 3))


def bind_vllm_fa4(b: Binding) -> Kernels:
    return _bind(b, vllm(VLLM_FA4, 4))


def _bind(b: Binding, package: Package) -> Kernels:
    if b.form == "absorbed":
        return _absorbed(b, package)
    if b.form == "materialised" or b.kv_layout is None:
        return _ragged(b, package)
    return _paged(b, package)


def bfloat16_sinks(sinks: Tensor) -> Tensor:
    return sinks.to(torch.bfloat16).contiguous()


def _always(b: Binding, package: Package) -> dict[str, Any]:
    """The keywords that never change. ``num_splits`` 1: one order of additions whatever else is in the batch; 0: the
    kernel's own choice. Left out is what the model does not have: not every package knows it."""
    given: dict[str, Any] = {
        "softmax_scale": b.scale, "causal": b.spec.causal, "window_size": both_sides(b),
        "softcap": b.spec.logit_softcap or 0.0, "num_splits": 1 if b.options.deterministic else 0,
    }  # fmt: skip
    if package.version is not None:
        given["fa_version"] = package.version
    if b.spec.attention_chunk is not None:
        given["attention_chunk"] = b.spec.attention_chunk
    if b.alibi_slopes is not None:
        given["alibi_slopes"] = torch.tensor(b.alibi_slopes, dtype=torch.float32, device=b.torch_device)
    return given


class Pages(Paged):
    """A step over pages, as keywords."""

    __slots__ = ("given", "metadata")

    given: dict[str, Any]
    metadata: Tensor | None

    def __init__(self, page_size: int, capture: Capture | None) -> None:
        super().__init__(page_size, capture)
        self.metadata = None

    def schedule(self, made: Tensor) -> Tensor:
        """``made``, where a graph was captured at the address it had then."""
        if self.capture is None or self.metadata is None:
            self.metadata = made
        else:
            self.metadata.copy_(made)
        return self.metadata


class Rows(Ragged):
    """A step over keys in memory, as keywords."""

    __slots__ = ("given",)

    given: dict[str, Any]


def _over_pages(b: Binding, package: Package, *, scheduled: bool) -> Callable[..., Pages]:
    """The role's ``plan``. ``scheduled``: with the metadata of fa3's scheduler."""
    always, page_size, tells_longest = _always(b, package), b.page_size or 1, package.tells_longest
    key_lens, table = package.key_lens, package.table
    masks = {
        name: always[name] for name in ("causal", "window_size", "attention_chunk", "num_splits") if name in always
    }
    get_metadata = load(package.requirement, package.module, "get_scheduler_metadata") if scheduled else None

    def plan(batch: Batch, *, capture: Capture | None = None, out: Pages | None = None) -> Pages:
        step = Pages(page_size, capture) if out is None else out
        step.fill(batch)
        longest = step.max_kv if tells_longest else step.table.shape[1] * page_size
        given = {
            **always, key_lens: step.kv_lens, table: step.table, "cu_seqlens_q": step.cu_query,
            "max_seqlen_q": step.max_query,
        }  # fmt: skip
        if tells_longest:
            given["max_seqlen_k"] = longest
        if get_metadata is not None:  # for the length that the forward will take for the longest, or its layout differs
            given["scheduler_metadata"] = step.schedule(
                get_metadata(
                    step.rows, step.max_query, longest, b.num_heads, b.num_kv_heads, b.head_dim, step.kv_lens,
                    qkv_dtype=b.kv_dtype, headdim_v=b.v_head_dim, cu_seqlens_q=step.cu_query, page_size=page_size,
                    has_softcap=always["softcap"] > 0, **masks,
                )
            )  # fmt: skip
        step.given = given
        return step

    return plan


def _paged(b: Binding, package: Package) -> Kernels:
    attend, step_of = load(package.requirement, package.module, package.paged), attrgetter(b.role)
    sinks_as, takes_out = package.sinks, package.takes_out
    kv_heads, limit = b.num_kv_heads, torch.finfo(torch.float8_e4m3fn).max
    plan = _over_pages(b, package, scheduled=package.schedules and b.role == "decode")

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, given = step_of(plan), {sinks_as: sinks, "out": out} if takes_out or sinks is not None else {}
        got = attend(q, kv_cache.k, kv_cache.v, **step.given, **given, return_softmax_lse=return_lse)
        return (got[0], got[1].T) if return_lse else got

    def call_fp8(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step, given = step_of(plan), {sinks_as: sinks, "out": out} if takes_out or sinks is not None else {}
        got = attend(
            q.clamp(-limit, limit).to(torch.float8_e4m3fn), kv_cache.k, kv_cache.v,
            k_descale=kv_cache.k_scale_t.expand(step.rows, kv_heads),
            v_descale=kv_cache.v_scale_t.expand(step.rows, kv_heads),
            **step.given, **given, return_softmax_lse=return_lse,
        )  # fmt: skip
        return (got[0], got[1].T) if return_lse else got

    return Kernels(
        plan=plan,
        call=call_fp8 if b.kv_dtype == torch.float8_e4m3fn else call,
        prepare_sinks=None if package.version == 4 else bfloat16_sinks,
    )


def _ragged(b: Binding, package: Package) -> Kernels:
    """Keys in memory: encoders, and materialised MLA."""
    attend, step_of = load(package.requirement, package.module, "flash_attn_varlen_func"), attrgetter(b.role)
    always, sinks_as, lse_as, takes_out = _always(b, package), package.sinks, package.ragged_lse, package.takes_out

    def plan(batch: Batch, *, capture: Capture | None = None, out: Rows | None = None) -> Rows:
        step = Rows() if out is None else out
        step.fill(batch)
        step.given = {
            **always, "cu_seqlens_q": step.cu_query, "cu_seqlens_k": step.cu_kv, "max_seqlen_q": step.max_query,
            "max_seqlen_k": step.max_kv,
        }  # fmt: skip
        return step

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        given = {sinks_as: sinks, "out": out} if takes_out or sinks is not None else {}
        got = attend(q, k, v, **step_of(plan).given, **given, **{lse_as: return_lse})
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=plan, call=call)


def _absorbed(b: Binding, package: Package) -> Kernels:
    """One key/value head: the cache's rotary part is k, its latent part v, and q's latent part goes along."""
    attend, step_of = load(package.requirement, package.module, package.paged), attrgetter(b.role)
    latent, split, latent_as, sinks_as = b.v_head_dim, b.mla_query == "split", package.latent, package.sinks
    takes_out = package.takes_out
    widths = (latent, b.head_dim - latent)

    def views(kv_cache: Any) -> tuple[Tensor, Tensor]:
        rows = kv_cache.data[0].unsqueeze(2)
        made = kv_cache.memo["fa3"] = (rows[..., latent:], rows[..., :latent])
        return made

    def call(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        step = step_of(plan)
        rope, latents = kv_cache.memo.get("fa3") or views(kv_cache)
        q_latent, q_rope = q if split else q.split_with_sizes(widths, -1)
        given = {latent_as: q_latent}
        if takes_out or sinks is not None:
            given[sinks_as], given["out"] = sinks, out
        got = attend(q_rope, rope, latents, **step.given, **given, return_softmax_lse=return_lse)
        return (got[0], got[1].T) if return_lse else got

    return Kernels(plan=_over_pages(b, package, scheduled=False), call=call)
