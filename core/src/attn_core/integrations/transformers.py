"""attn-core under the models of Hugging Face transformers.

    from attn_core.integrations import transformers as hf

    hf.register()
    model.set_attn_implementation("attn_core")   # decided at the first forward, once per model
    attn = hf.attach(model, deterministic=True)  # or decided now, with engine options; attn.decision explains it

Inference with encoders, decoders and encoder-decoders, over transformers' own caches: dynamic, static and sliding.
Whatever a layer asks for that its decision does not cover raises; nothing is dropped (docs/transformers.md).
Written for transformers 5: ``AttentionInterface`` calls ``attention`` once per layer, ``AttentionMaskInterface`` calls
``mask`` once per forward and kind of layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_core.errors import AttnCoreError
from attn_core.integrations.hf_call import LATER, check_call, tensors
from attn_core.integrations.hf_models import Owner, own, owner_of
from attn_core.runtime import AttentionBackend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "attn_core"
"""What ``set_attn_implementation`` takes. A plain word: transformers reads meaning into ``flash``, ``/`` and ``|``."""


def register() -> None:
    """Install ``attn_core`` among transformers' attention implementations: the mask function and the attention.

    Both or none: without its mask function transformers hands an attention function no mask at all, and results are
    silently wrong. Checked on tiny padded tensors before the attention is installed; raises :class:`AttnCoreError`
    when they disagree with plain softmax attention. Calling it again does nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS.get(NAME) is attention and ALL_MASK_ATTENTION_FUNCTIONS.get(NAME) is mask:
        return
    AttentionMaskInterface.register(NAME, mask)
    self_check()
    AttentionInterface.register(NAME, attention)


def attach(model: PreTrainedModel, **options: Any) -> AttentionBackend:
    """Decide and bind for ``model`` now, and make it use the kernels. ``options`` are those of the engine.

    The question is the model's config in the dtype and on the device its weights have. Raises :class:`NoBackendError`
    with every reason, :class:`AttnCoreError` for models this integration does not support.
    """
    register()
    owner = Owner(options, type(model).__name__)
    bound = owner.bound(model.config, model.dtype, model.device)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise AttnCoreError(f"{type(model).__name__} does not let its attention be replaced; {LATER}")
    own(model, owner)
    return bound.backend


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask as booleans ``(batch, 1, queries, keys)``, or None where every token sees every other.

    ``attention`` reads ragged lengths out of it and verifies the rest, so nothing a model expresses here gets lost.
    """
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = sdpa_mask(*args, **kwargs)
    return made


@torch.compiler.disable  # type: ignore[untyped-decorator] # lengths are read on the host: nothing to trace
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """q, k, v ``(batch, heads, length, width)`` -> output ``(batch, length, heads, width)``, and no weights.

    Raises :class:`AttnCoreError` when the call asks for anything that the model's decision does not cover.
    """
    if getattr(module, "config", None) is None:
        raise AttnCoreError(f"{type(module).__name__} has no config, so its attention cannot be decided; {LATER}")
    layer = owner_of(module).layer(module, query.dtype, query.device, kwargs.get("is_causal"))
    check_call(layer.group, module, query, key, value, dropout, scaling, kwargs)
    # Out of inference mode: buffers that kernels keep must serve later calls outside of it too.
    with torch.inference_mode(False), torch.no_grad():
        given = tensors(layer.group, module, kwargs)
        out = layer.run(id(module), query, key, value, attention_mask, **given)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out = _ForwardOnly.apply(out, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


class _ForwardOnly(torch.autograd.Function):
    """The kernels have no backward. Without this, gradients would silently miss the attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *_: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AttnCoreError(
            f"attention implementation {NAME!r} is for inference: its kernels have no backward; train with 'sdpa'"
        )


def self_check(tolerance: float = 1e-5) -> None:
    """Run tiny layers through ``mask`` and ``attention`` as transformers would; compare with plain softmax.

    A bidirectional layer, and a causal one with grouped heads over a cache: a prompt, then one more token. Each without
    padding, padded on the right (the bidirectional one) and on the left. Raises :class:`AttnCoreError` naming the
    largest difference, or saying that transformers did not ask our mask function.
    """
    from transformers import BertConfig, DynamicCache, LlamaConfig
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    generator = torch.Generator().manual_seed(0)

    def check(module: Any, q: Tensor, k: Tensor, v: Tensor, made: Any, keep: Tensor, what: str) -> None:
        """``keep`` ``(batch, keys)``: the real tokens; the queries are the last ones."""
        queries, scale = q.shape[2], q.shape[-1] ** -0.5
        if made is None and not bool(keep.all()):
            raise AttnCoreError("transformers did not ask attn_core for a mask: padding would be attended to")
        got = attention(module, q, k, v, made, scaling=scale)[0]
        seen = keep[:, None, None].expand(-1, 1, queries, -1)
        if module.is_causal:
            seen = seen.tril(k.shape[2] - queries)
        whole = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = (q @ next(whole).mT * scale).masked_fill(~seen, -math.inf)
        want = (logits.softmax(-1) @ next(whole)).transpose(1, 2)
        worst = float((got - want)[keep[:, -queries:]].abs().max())
        if not worst <= tolerance:
            raise AttnCoreError(f"attn_core in transformers is off by {worst:.3g} in {what}; not installed")

    def layer(config: Any, causal: bool) -> Any:
        config._attn_implementation = NAME
        module = nn.Module()
        module.__dict__.update(config=config, layer_idx=0, is_causal=causal)
        return module

    encoder, decoder = layer(BertConfig(**sizes), False), layer(LlamaConfig(**sizes, num_key_value_heads=2), True)
    for real in ("1111111 1111111", "1111111 1110000", "0001111 1111111"):
        keep = torch.tensor([[c == "1" for c in row] for row in real.split()])
        padding = None if keep.all() else keep.long()
        q, k, v = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (4, 4, 4))
        made = create_bidirectional_mask(encoder.config, q[:, 0], padding)
        check(encoder, q, k, v, made, keep, f"an encoder with padding {real}")
        if not keep[:, -1].all():
            continue
        cache = DynamicCache()
        for start, end in ((0, 6), (6, 7)):
            padding = None if keep.all() else keep[:, :end].long()
            made = create_causal_mask(decoder.config, q[:, 0, start:end], padding, cache)
            ours = cache.update(k[:, :2, start:end], v[:, :2, start:end], 0)
            check(decoder, q[:, :, start:end], *ours, made, keep[:, :end], f"a decoder with padding {real}")
