"""vLLM's attention backend ``CUSTOM``: whatever attn-core decided, on vLLM's own paged cache.

vLLM asks a backend's class about layouts and block sizes, a builder for one object per step, and each layer's impl to
attend. The answers of the class are a decision's, so each question has a class of its own (``backend_for``); builders
bind the kernels when the cache's layout is settled, and hand every layer its group. After that a layer calls
``group.forward`` and nothing is looked up.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from attn_core.errors import AttnCoreError, BindError, NoBackendError
from attn_core.integrations.vllm import NAME
from attn_core.integrations.vllm.binding import (
    LayerFacts,
    bound,
    check_layer,
    in_layout,
    layouts,
    prepared_sinks,
)
from attn_core.integrations.vllm.caches import wrapped
from attn_core.integrations.vllm.question import Question, question_of
from attn_core.integrations.vllm.refusal import reasons
from attn_core.integrations.vllm.selection import ATTN_TYPES, beyond
from attn_core.integrations.vllm.step import Step, tokens
from attn_core.runtime import BoundGroup, KVCache

SPECS = (FullAttentionSpec, SlidingWindowSpec, EncoderOnlyAttentionSpec, MLAAttentionSpec)
"""Kinds of cache whose steps mean what ours do. Exactly these: subclasses add rules of their own."""


class AttnCoreBackend(AttentionBackend):  # type: ignore[misc, unused-ignore]
    """The backend as vLLM knows it. Subclasses made by :func:`backend_for` know their question; this one, reached by
    its registered name on other vendors' platforms, asks the config that is being built."""

    question: ClassVar[Question | None] = None

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[AttnCoreImpl]:
        return AttnCoreImpl

    @staticmethod
    def get_builder_cls() -> type[AttnCoreBuilder]:
        return AttnCoreBuilder

    @classmethod
    def asked(cls) -> Question | None:
        """The question, as far as one is known here."""
        config = get_current_vllm_config_or_none() if cls.question is None else None
        known = config is not None and config.model_config is not None
        return question_of(config) if known else cls.question

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """None, which is any: where no question is known, or nothing is cached."""
        question = cls.asked()
        names = () if question is None else layouts(question)
        return tuple(KVCacheLayout[name] for name in names) or None

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        question = cls.asked()
        page_size = None if question is None else question.decision.values.get("page_size")
        return [MultipleOf(1) if page_size is None else page_size]

    @classmethod
    def validate_configuration(cls, *, device_capability: Any = None, **fields: Any) -> list[str]:
        """Every reason against this configuration: what we do not run, and what our decision says. The latter rests on
        vLLM's config, which says more than the fields of its selector."""
        question, found = cls.asked(), beyond(fields)
        if question is None or found:
            return found or ["attn-core decides for a whole model, and no engine is being configured"]
        try:
            layouts(question)
        except NoBackendError as e:
            return [f"{name}: {text}" for name, texts in reasons(e.rejections).items() for text in texts]
        except AttnCoreError as e:
            return [str(e)]
        return []


def backend_for(question: Question, base: type[AttnCoreBackend] = AttnCoreBackend) -> type[AttnCoreBackend]:
    """The backend class of one question, importable by its path while this process lives."""
    name = f"{base.__name__}_{question.decision.digest}"
    if name not in globals():
        globals()[name] = type(name, (base,), {"question": question, "__module__": __name__})
    made: type[AttnCoreBackend] = globals()[name]
    return made


class AttnCoreImpl(AttentionImpl[Step]):  # type: ignore[misc, unused-ignore]
    """One layer. Made with the model, when caches have no layout yet; a builder gives it its group later."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.facts = LayerFacts(
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=head_size,
            scale=self.scale,
            sliding_window=sliding_window,
            logit_softcap=logits_soft_cap or None,
            alibi_slopes=None if alibi_slopes is None else tuple(map(float, alibi_slopes)),
            attn_type=ATTN_TYPES[str(getattr(attn_type, "value", attn_type))],
            sinks=sinks is not None,
            shares_kv=kv_sharing_target_layer_name is not None,
        )
        self.group: BoundGroup | None = None
        self._place = 0
        self._cache: KVCache | None = None
        self._cache_of: Tensor | None = None
        self._sinks: Any = None

    def attach(self, layer: Any, group: BoundGroup, place: int, step: Step) -> None:
        """Take ``group``'s kernels, whose plan is number ``place`` of a step's. Raises :class:`BindError` when the
        layer is not what the group was decided for."""
        check_layer(layer.layer_name, self.facts, group)
        self.group, self._place, self._cache_of = group, place, None
        self._sinks = prepared_sinks(group, self.sinks)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Weights changed: sinks are among them."""
        if self.group is not None:
            self._sinks = prepared_sinks(self.group, self.sinks)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys, then attend; ``query`` and ``output`` ``(tokens, heads, width)``, the latter filled.

        Steps without metadata measure memory: ``output`` stays as it is.
        """
        group, step = self.group, attn_metadata
        if step is None or step.num_tokens == 0:
            return output
        if group is None or output_scale is not None or output_block_scale is not None:
            raise _misuse(layer, group)
        if kv_cache is not self._cache_of:
            self._cache = wrapped(kv_cache, group, layer) if group.spec.cached else None
            self._cache_of = kv_cache
        n = step.num_tokens
        group.forward(
            tokens(query, n), tokens(key, n), tokens(value, n), self._cache, step.plans[self._place],
            sinks=self._sinks, out=tokens(output, n),
        )  # fmt: skip
        return output


def _misuse(layer: Any, group: BoundGroup | None) -> AttnCoreError:
    if group is None:
        return BindError(f"layer {layer.layer_name} attends, but no cache group of vLLM has it")
    return AttnCoreError(f"layer {layer.layer_name}: quantised output is not supported; disable that fusion")


class AttnCoreBuilder(AttentionMetadataBuilder[Step]):  # type: ignore[misc, unused-ignore]
    """One cache group of vLLM: binds the kernels of its layers, fills one step at a time.

    vLLM's groups share block tables, ours share kernels: the layers of one of theirs may belong to several of ours
    (windows of different reach in one block table), and one of ours may be spread over several of theirs.
    """

    _cudagraph_support = AttentionCGSupport.NEVER
    step_type: ClassVar[type[Step]] = Step

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if type(kv_cache_spec) not in SPECS:
            raise BindError(
                f"layers {layer_names[0]}, ... keep a cache of kind {type(kv_cache_spec).__name__}, which attn-core "
                f"does not run in vLLM; it runs {', '.join(s.__name__ for s in SPECS)}"
            )
        self._init_reorder_batch_threshold(1)
        question = in_layout(question_of(vllm_config), vllm_config.cache_config.kv_cache_layout)
        attn = bound(question, device.index or 0, get_tensor_model_parallel_rank())
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        own = {name: attn.group_of(extract_layer_index(name)) for name in layers}
        groups = list(dict.fromkeys(own.values()))
        self.step = self.step_type(groups)
        for name, layer in layers.items():
            layer.impl.attach(layer, own[name], groups.index(own[name]), self.step)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        return self.step.fill(common_attn_metadata)
