"""Bidirectional encoders: the BERT family and ModernBERT."""

from __future__ import annotations

from dataclasses import replace

from attn_core.errors import BadInputError
from attn_core.models import dense
from attn_core.models.layers import collect
from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec, Group


def read(v: View) -> dict[str, Group]:
    """BERT and its kin: one group ``encoder``, or ``full`` for a BERT trained as a causal decoder.

    Relative position embeddings of old BERTs depend on q, which no additive bias expresses: refused.
    """
    kind = v.get("position_embedding_type")
    if kind is not None and str(kind).startswith("relative"):
        raise BadInputError(f"{v.name}: position_embedding_type={kind!r} adds a term that depends on q; not supported")
    decoder = v.flag("is_decoder")
    if decoder and v.flag("add_cross_attention"):
        raise BadInputError(f"{v.name}: add_cross_attention=True is not supported for a BERT decoder")
    spec = dense.attention(v, attn_type="decoder" if decoder else "encoder_only")
    return collect((i, "full" if decoder else "encoder", spec) for i in range(v.layers))


def read_biased(v: View) -> dict[str, Group]:
    """MPNet: a learned bias per bucket of relative positions, added in every layer."""
    spec = dense.attention(v, attn_type="encoder_only", bias=True)
    return collect((i, "encoder", spec) for i in range(v.layers))


def read_modernbert(v: View) -> dict[str, Group]:
    """ModernBERT: every ``global_attn_every_n_layers``-th layer is ``full``, the others ``sliding``.

    ``local_attention`` is the total width: |i-j| <= local_attention // 2, one more in our strict |i-j| < W.
    Source: ``ModernBertConfig.sliding_window`` and ``sliding_window_bidirectional_overlay`` in transformers.
    """
    return _alternating(v, dense.attention(v, attn_type="encoder_only"), v.size("local_attention", 128) // 2 + 1)


def read_modernbert_decoder(v: View) -> dict[str, Group]:
    """The causal ModernBERT: half of ``local_attention``, the token itself included (``ModernBertDecoderConfig``)."""
    return _alternating(v, dense.attention(v), v.size("local_attention", 128) // 2)


def _alternating(v: View, base: AttentionSpec, window: int) -> dict[str, Group]:
    types, _ = v.get("layer_types"), v.get("position_embedding_type")
    if types is None:
        every = v.size("global_attn_every_n_layers", 3)
        types = ["sliding_attention" if i % every else "full_attention" for i in range(v.layers)]
    local = replace(base, sliding_window=window)
    specs: dict[str, tuple[str, Group]] = {"full_attention": ("full", base), "sliding_attention": ("sliding", local)}
    if not isinstance(types, list | tuple) or len(types) != v.layers or any(t not in list(specs) for t in types):
        raise BadInputError(f"{v.name}: layer_types must be {' or '.join(specs)} for each of {v.layers} layers")
    return collect((i, *specs[kind]) for i, kind in enumerate(types))
