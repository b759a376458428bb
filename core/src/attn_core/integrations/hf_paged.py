"""attn-core's kernels under the continuous batching of Hugging Face transformers.

    from attn_core.integrations import hf_paged

    with hf_paged.continuous_batching(model) as attn:   # decided and bound here, with engine options as keywords
        print(attn.decision.explain())
        outputs = model.generate_batch(prompts, generation_config=..., continuous_batching_config=...)

transformers schedules, allocates and frees; inside the block its layers write and read its cache through the bound
kernels. Its tensors are wrapped as they are (pages of one token), so its own gather of every key at every step is not
called. Written for transformers 5.20 to 5.23: outside of the block nothing of it is changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.integrations.devices import platform_of
from attn_core.integrations.hf_call import check_call, tensors
from attn_core.integrations.hf_models import spec_of
from attn_core.integrations.hf_paged_cache import GEOMETRY, Cache
from attn_core.integrations.hf_paged_step import KEYWORDS, WRITTEN_FOR
from attn_core.runtime import AttentionBackend
from attn_core.spec import AttentionSpec, Decision, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "paged|eager"
"""The implementation whose function is replaced: the one that continuous batching takes on any device."""


@contextmanager
def continuous_batching(model: PreTrainedModel, **options: Any) -> Iterator[PagedAttention]:
    """Inside the block, ``model.generate_batch`` and ``model.init_continuous_batching`` run on attn-core's kernels.

    ``options`` are those of the engine; page size, layout and dtype of the cache are transformers' and pinned. Raises
    :class:`NoBackendError` with every reason, :class:`AttnCoreError` for a model that it cannot serve. transformers'
    generation loop runs in a thread and only logs what goes wrong there: an error of ours fails the requests of its
    step, and is raised again when the block ends.
    """
    made = PagedAttention(model, options)
    _serve(model, made)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise AttnCoreError(f"{type(model).__name__} does not let its attention be replaced")
        yield made
    finally:
        _release(model)
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(before)
    if made.error is not None:
        raise AttnCoreError(f"attention failed in the generation loop, and its requests with it: {made.error}") from (
            made.error
        )


class PagedAttention:
    """A model's kernels, bound for transformers' cache, and what they were used for."""

    backend: AttentionBackend
    calls: int
    """Layers run so far."""
    carried_keys: int
    """Keys copied out of the rings of sliding layers so far, for chunks of prompts that continue; per layer."""
    error: BaseException | None
    """The first one raised by a layer."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        pinned: dict[str, Any] = {**GEOMETRY, "kv_cache_dtype": str(model.dtype).removeprefix("torch.")}
        given = sorted(pinned.keys() & options.keys())
        if given:
            raise BadInputError(f"{', '.join(given)}: the cache is transformers' own; {pinned} cannot be chosen")
        spec = spec_of(model.config.get_text_config(), model.dtype)
        refuse(model, spec)
        platform = platform_of(model.device.type)
        there = [d.index for d in platform.devices]
        if (model.device.index or 0) not in there:
            raise BadInputError(f"the model lies on {model.device}; {platform.name} has devices {there}")
        index = there.index(model.device.index or 0)
        self.backend = platform.attention_backend(spec, device=index, **pinned, **options)
        self.calls = self.carried_keys = 0
        self.error = None
        self._dtype = model.dtype
        self._caches: weakref.WeakKeyDictionary[Any, Cache] = weakref.WeakKeyDictionary()

    @property
    def decision(self) -> Decision:
        return self.backend.decision

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """One layer of one step. q, k, v ``(1, heads, tokens, width)`` -> ``(1, tokens, heads, width)``."""
        layer = _layer(module)
        group = self.backend.group_of(layer)
        if q.dtype != self._dtype:
            raise BadInputError(f"{type(module).__name__} runs in {q.dtype}, the decision was made for {self._dtype}")
        plain = {name: value for name, value in kwargs.items() if name not in KEYWORDS}
        check_call(group, module, q, k, v, plain.pop("dropout", 0.0), scaling, plain)
        sinks = tensors(group, module, plain)["sinks"]
        theirs = kwargs.get("cache")
        if theirs is None:
            raise AttnCoreError(
                f"{NAME} was called without a paged cache; inside this block only continuous batching is"
            )
        cache = self._caches.get(theirs)
        if cache is None:
            cache = self._caches.setdefault(theirs, Cache())
        packed = tuple(x[0].transpose(0, 1) for x in (q, k, v))
        out = cache.attend(group, layer, theirs, packed, sinks, kwargs)
        self.calls += 1
        self.carried_keys += cache.carried
        return out.unsqueeze(0)


def refuse(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Raise :class:`AttnCoreError` for a model that transformers' paged cache or this module cannot serve."""
    name = type(model).__name__
    if not hasattr(model, "generate_batch"):
        raise AttnCoreError(f"{name} has no generate_batch: it does not generate tokens")
    if find_spec("transformers.generation.continuous_batching.cache_allocators") is None:
        raise AttnCoreError(f"transformers {version('transformers')} has another paged cache; {WRITTEN_FOR}")
    if model.training:
        raise AttnCoreError(f"{name} is in training mode; call model.eval()")
    for group, g in spec.groups.items():
        if not isinstance(g, AttentionSpec):
            raise AttnCoreError(f"{name}: group {group!r} is linear attention ({g.kind}), which has no paged cache")
        told = (
            (g.attn_type != "decoder", f"{g.attn_type} attention"),
            (g.kind != "mha" or g.head_dim != g.v_head_dim, "keys and values of unequal width"),
            (g.attention_chunk is not None, "chunked attention"),
            (g.bidirectional_prefix, "bidirectional spans"),
            (g.bias or g.alibi_slopes is not None, "a bias on the logits"),
            (g.sparse != "none", "sparse attention"),
            (g.kv_from is not None, "keys of another layer"),
        )
        for refused, what in told:
            if refused:
                raise AttnCoreError(f"{name}: group {group!r} has {what}, which continuous batching cannot serve here")


def _layer(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or not getattr(module, "is_causal", True):
        raise AttnCoreError(f"{type(module).__name__} is no causal layer with an index; {WRITTEN_FOR}")
    return index


# which model is served by whom

_lock = threading.Lock()
_served: weakref.WeakKeyDictionary[nn.Module, PagedAttention] = weakref.WeakKeyDictionary()
_models: list[PreTrainedModel] = []
_original: Callable[..., Any] | None = None


def _serve(model: PreTrainedModel, made: PagedAttention) -> None:
    """Install our function while any model is served. Other models keep what was there."""
    global _original
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _lock:
        if model in _models:
            raise AttnCoreError(f"this {type(model).__name__} is served already; leave the other block first")
        if not _models:
            _original = ALL_ATTENTION_FUNCTIONS[NAME]
            ALL_ATTENTION_FUNCTIONS[NAME] = _attention
        _models.append(model)
        for module in model.modules():
            _served[module] = made


def _release(model: PreTrainedModel) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _lock:
        _models[:] = [m for m in _models if m is not model]
        for module in model.modules():
            _served.pop(module, None)
        if not _models:
            del ALL_ATTENTION_FUNCTIONS[NAME]  # type: ignore[no-untyped-call]
            if ALL_ATTENTION_FUNCTIONS[NAME] is not _original:  # somebody else had replaced it, too
                ALL_ATTENTION_FUNCTIONS[NAME] = _original


@torch.compiler.disable  # type: ignore[untyped-decorator] # lengths are read on the host: nothing to trace
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    made = _served.get(module)
    if made is None:
        if _original is None:
            raise AttnCoreError(f"{NAME} of attn-core was called outside of its block")
        return _original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    try:
        return made.attend(module, query, key, value, scaling, kwargs), None
    except BaseException as e:
        made.error = made.error or e
        raise
