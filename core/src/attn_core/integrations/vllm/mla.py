"""MLA layers: vLLM applies the projections, we attend over its latent cache in the form that was decided.

vLLM sends the first ``num_decode_tokens`` tokens through ``forward_mqa`` as absorbed queries and the rest through
``forward_mha`` with the latent rows, to be expanded. Where prefill is absorbed too, all tokens go the first way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import MLAAttentionImpl

from attn_core.errors import AttnCoreError, BindError
from attn_core.integrations.vllm.backend import AttnCoreBackend, AttnCoreBuilder
from attn_core.integrations.vllm.binding import LayerFacts, check_layer
from attn_core.integrations.vllm.caches import wrapped
from attn_core.integrations.vllm.step import Step
from attn_core.runtime import BoundGroup, KVCache, Plan


class MlaStep(Step):
    """A step of one MLA group, with the names that vLLM's layer reads."""

    plan: Plan

    def fill(self, common: Any) -> MlaStep:
        super().fill(common)
        (plan,) = self.plans
        self.num_actual_tokens = self.num_tokens
        if plan is not None and plan.batch is not None:
            self.plan = plan
            rows = plan.batch.num_seqs
            self.num_decodes = plan.num_decode_rows if self.groups[0].materialised else rows
            self.num_prefills = rows - self.num_decodes
            self.num_decode_tokens = plan.num_decode_tokens if self.groups[0].materialised else self.num_tokens
        return self

    @property
    def decode(self) -> Plan:
        return self.plan

    @property
    def prefill(self) -> Plan:
        return self.plan


class AttnCoreMlaImpl(MLAAttentionImpl[MlaStep]):  # type: ignore[misc, unused-ignore]
    """One MLA layer; made and attached as an ``AttnCoreImpl`` is."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        qk_head_dim: int,
        v_head_dim: int,
        kv_b_proj: Any,
        indexer: object | None = None,
        q_pad_num_heads: int | None = None,
    ) -> None:
        if indexer is not None or q_pad_num_heads is not None:
            raise BindError("attn-core runs dense MLA without padded heads in vLLM; this layer has an indexer or pads")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.kv_cache_dtype, self.kv_lora_rank, self.q_pad_num_heads = kv_cache_dtype, kv_lora_rank, None
        self.kv_b_proj, self.widths = kv_b_proj, (qk_nope_head_dim, v_head_dim)
        self.facts = LayerFacts(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=qk_head_dim,
            scale=self.scale,
            sliding_window=sliding_window,
            logit_softcap=logits_soft_cap or None,
            alibi_slopes=None,
            attn_type="decoder",
            sinks=False,
            shares_kv=kv_sharing_target_layer_name is not None,
            latent=(kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim),
        )
        self.group: BoundGroup | None = None
        self._step: MlaStep | None = None
        self._layer: Any = None
        self._caches: tuple[Tensor | None, KVCache | None] = (None, None)

    def attach(self, layer: Any, group: BoundGroup, place: int, step: MlaStep) -> None:
        """Take ``group``'s kernels. Writing a cache comes without metadata, so the layer holds the step itself."""
        check_layer(layer.layer_name, self.facts, group)
        self.group, self._step, self._layer, self._caches = group, step, layer, (None, None)

    def do_kv_cache_update(
        self, kv_c_normed: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, *_: Any, **__: Any
    ) -> None:
        """Write latent ``(tokens, latent)`` and rotary ``(tokens, 1, rope)`` rows at the step's slots."""
        group, step = self.group, self._step
        if group is not None and step is not None and step.num_tokens:
            n = step.num_tokens
            group.write_kv(kv_c_normed[:n], k_pe[:n].squeeze(1), self._cache(group, kv_cache), step.plan)

    def forward_mqa(self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: MlaStep, layer: Any) -> tuple[Any, None]:
        """Absorbed attention: ``q`` a pair ``(tokens, heads, latent)``, ``(tokens, heads, rope)`` or both in one."""
        group, plan = self._own(attn_metadata), attn_metadata.plan
        cache = self._cache(group, kv_c_and_k_pe_cache)
        whole = torch.cat(q, -1) if isinstance(q, tuple) else q
        out = whole.new_empty((*whole.shape[:2], self.kv_lora_rank))
        n = whole.shape[0] if group.unified else plan.num_decode_tokens
        if n:
            group.decode(self._query(group, whole[:n]), None, None, cache, plan, out=out[:n])
        if n < whole.shape[0]:
            group.prefill(self._query(group, whole[n:]), None, None, cache, plan, out=out[n:])
        return out, None

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MlaStep,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """Materialised prefill of the rows that do not decode, their cached context included."""
        group = self._own(attn_metadata)
        k, v = self._expand(kv_c_normed, k_pe.squeeze(1))
        out = output.view(-1, self.num_heads, self.widths[1])
        cache = self._cache(group, kv_c_and_k_pe_cache)
        group.prefill_with_context(q, k, v, cache, attn_metadata.plan, self._expand, out=out)

    def _own(self, step: MlaStep) -> BoundGroup:
        if self.group is None or step is not self._step:
            raise AttnCoreError("this MLA layer was given another layer's step; micro-batches are not supported")
        return self.group

    def _query(self, group: BoundGroup, q: Tensor) -> Any:
        return (
            q
            if group.mla_query == "packed"
            else q.split_with_sizes((self.kv_lora_rank, q.shape[-1] - self.kv_lora_rank), -1)
        )

    def _expand(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """k ``(keys, heads, nope + rope)`` and v ``(keys, heads, v)`` of latent rows, by the layer's weights."""
        both = self.kv_b_proj(latent)[0].view(-1, self.num_heads, sum(self.widths))
        nope, v = both.split_with_sizes(self.widths, -1)
        return torch.cat((nope, rope.unsqueeze(1).expand(-1, self.num_heads, -1)), -1), v

    def _cache(self, group: BoundGroup, kv_cache: Tensor) -> KVCache:
        known, cache = self._caches
        if known is not kv_cache or cache is None:
            cache = wrapped(kv_cache, group, self._layer)
            self._caches = kv_cache, cache
        return cache


class AttnCoreMlaBuilder(AttnCoreBuilder):
    step_type = MlaStep


class AttnCoreMlaBackend(AttnCoreBackend):
    @classmethod
    def is_mla(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[AttnCoreMlaImpl]:
        return AttnCoreMlaImpl

    @staticmethod
    def get_builder_cls() -> type[AttnCoreMlaBuilder]:
        return AttnCoreMlaBuilder
