"""Encoder-decoders: T5 (no scale, learned position bias), Whisper, BART and their kin."""

from __future__ import annotations

from dataclasses import replace

from attn_core.models.view import View
from attn_core.spec.model import AttentionSpec, Group

ENCODER_ONLY = ("EncoderModel", "AudioClassification", "Encoder")
"""Endings of architectures that drop the decoder."""


def read_t5(v: View) -> dict[str, Group]:
    """T5: scale 1; the self-attentions add a bias by relative position, cross attention does not.

    Source: ``T5Attention``, where ``EncDecAttention`` has no relative bias.
    """
    v.need("num_attention_heads", "num_hidden_layers", "head_dim")
    for detail in ("relative_attention_num_buckets", "relative_attention_max_distance"):
        v.get(detail)
    base = AttentionSpec(num_heads=v.size("num_attention_heads"), head_dim=v.head_dim, dtype=v.dtype, scale=1.0)
    deep = v.size("num_decoder_layers", v.layers)
    return _stacks(v, replace(base, bias=True), v.layers, replace(base, bias=True), deep, base)


def read_bart(v: View) -> dict[str, Group]:
    """Whisper, BART, Pegasus, Marian, M2M: separate heads and depth for each stack, width ``d_model`` over heads.

    transformers multiplies Whisper's q before the kernel and passes 1.0; the product is the usual 1/sqrt(head_dim),
    which is what the spec says.
    """
    v.need("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    encoder, decoder = (_stack(v, v.size(f"{side}_attention_heads")) for side in ("encoder", "decoder"))
    return _stacks(v, encoder, v.size("encoder_layers"), decoder, v.size("decoder_layers"), decoder)


def _stack(v: View, heads: int) -> AttentionSpec:
    return AttentionSpec(num_heads=heads, head_dim=v.but(num_attention_heads=heads).head_dim, dtype=v.dtype)


def _stacks(
    v: View, encoder: AttentionSpec, encoder_layers: int, full: AttentionSpec, layers: int, cross: AttentionSpec
) -> dict[str, Group]:
    """``encoder``, ``full`` (the decoder's self-attention) and ``cross``, as far as the architecture has them."""
    below = replace(encoder, attn_type="encoder_only", layers=tuple(range(encoder_layers)))
    above = tuple(range(layers))
    own = replace(full, layers=above)
    if v.architecture.endswith(ENCODER_ONLY):
        return {"encoder": below}
    if v.get("is_encoder_decoder") is False:
        return {"full": own}
    return {"encoder": below, "full": own, "cross": replace(cross, attn_type="cross", layers=above)}
