"""SGLang's ``AttentionBackend`` on kernels that attn-core bound: plans per step and group, writes the cache itself.

Inherits nothing but the interface. Everything that can be known when SGLang builds it is checked then: the decision is
made for what SGLang really allocated, and every layer of the loaded model is held against its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_exec, get_parallel
from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.integrations.devices import platform_of
from attn_core.integrations.sglang.layers import check_layer
from attn_core.integrations.sglang.mla import always_absorbed, expanded, new_rows, require_absorbed
from attn_core.integrations.sglang.pool import Translate, page_table, translation, wrap_layer
from attn_core.integrations.sglang.question import LAYOUTS, model_spec, options
from attn_core.integrations.sglang.step import read_step
from attn_core.runtime import KV_DTYPES, Batch, BoundGroup, KVCache, Plan

DTYPE_NAMES = {dtype: name for name, dtype in reversed(KV_DTYPES.items())}
"""torch dtype of a pool -> what the decision calls it."""


@dataclass(kw_only=True)
class Group:
    """A bound group in this model: where its rows lie, and the plan that every step refills."""

    bound: BoundGroup
    translate: Translate | None
    plan: Plan | None = None


@dataclass(kw_only=True)
class Layer:
    """What one layer calls."""

    group: Group
    cache: KVCache
    sinks: Any = None
    """As ``prepare_sinks`` made them, at the layer's first call."""


class AttnCoreBackend(AttentionBackend):  # type: ignore[misc, unused-ignore]
    """Built by SGLang for one model runner, when its weights are loaded and its pools allocated.

    Raises :class:`NoBackendError` when nothing fits the page size and cache dtype that SGLang ended up with,
    :class:`AttnCoreError` for pools and layers it cannot serve.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        ranks = get_parallel()
        spec = model_spec(runner.model_config)
        self.page_size: int = runner.page_size
        pins = options(
            spec,
            page_size=self.page_size,
            kv_cache_dtype=DTYPE_NAMES.get(runner.kv_cache_dtype, str(runner.kv_cache_dtype)),
            tensor_parallel=ranks.attn_tp_size,
            deterministic=get_exec().deterministic.enable_deterministic_inference,
        )
        index = 0 if runner.device == "cpu" else runner.gpu_id
        self.attn = platform_of(runner.device).attention_backend(spec, device=index, rank=ranks.attn_tp_rank, **pins)
        # SGLang's models ask the backend for both pools.
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.layers: dict[RadixAttention, Layer] = {}
        self.groups: dict[str, Group] = {}
        self._tokens: Tensor | None = None
        for module in runner.model.modules():
            if isinstance(module, RadixAttention) and not expanded(module, self.attn.group_of(module.layer_id).spec):
                self._add(module)
        if any(group.bound.spec.kind == "mla" for group in self.groups.values()):
            always_absorbed()

    def _add(self, layer: RadixAttention) -> None:
        bound = self.attn.group_of(layer.layer_id)
        check_layer(layer, bound)
        require_absorbed(bound)
        pool = self.token_to_kv_pool
        cache = wrap_layer(
            pool,
            layer.layer_id,
            layout=LAYOUTS[bound.spec.kind],
            page_size=self.page_size,
            scales=(layer.k_scale_float or 1.0, layer.v_scale_float or 1.0),
        )
        group = self.groups.setdefault(bound.name, Group(bound=bound, translate=translation(pool, layer.layer_id)))
        self.layers[layer] = Layer(group=group, cache=cache)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once per step: every group's plan, refilled. SGLang calls it before the layers run."""
        step = read_step(forward_batch)
        self._tokens = step.tokens
        rows = self.req_to_token_pool.req_to_token
        batch: Batch | None = None
        for group in self.groups.values():
            move = group.translate
            table = page_table(rows, step.requests, max(step.kv_lens), self.page_size, move)
            slots = step.slots if move is None else move(step.slots)
            if batch is None:
                batch = Batch(step.query_lens, step.kv_lens, block_table=table, slot_mapping=slots)
            else:
                batch = batch.with_pages(table, slots)
            group.plan = group.bound.plan(batch, out=group.plan)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """q ``(tokens, heads * width)`` and k, v ``(tokens, kv heads, width)`` of the new tokens -> like q.

        Writes k and v to the cache, then attends. ``sinks`` ``(heads,)`` as the model holds them. Raises
        :class:`AttnCoreError` for keywords nobody here knows, and for a cache that is written elsewhere.
        """
        here = self.layers[layer]
        group, sinks = here.group.bound, kwargs.pop("sinks", None)
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown or not save_kv_cache:
            what = f"keywords {unknown}" if unknown else "save_kv_cache=False"
            raise AttnCoreError(f"layer {layer.layer_id}: {what} is not supported by the SGLang integration")
        if sinks is not None and here.sinks is None:
            here.sinks = group.prepare_sinks(sinks)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k, v = new_rows(k, v, group.spec)
        tokens = self._tokens
        if tokens is None:
            out: Tensor = group.forward(q, k, v, here.cache, here.group.plan, sinks=here.sinks)
        else:
            out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
            out[tokens] = group.forward(q[tokens], k[tokens], v[tokens], here.cache, here.group.plan, sinks=here.sinks)
        return out.flatten(1)

    forward_decode = forward_extend
