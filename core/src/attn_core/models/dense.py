"""Decoders whose config says it all: heads, widths, windows, scale, caps. The reader that most models need.

It honours every field it knows from any model, so it also serves architectures we have not seen
(:mod:`attn_core.models.unknown`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models import mla
from attn_core.models.alibi import slopes
from attn_core.models.layers import collect, kinds, window
from attn_core.models.linear import linear
from attn_core.models.view import View
from attn_core.spec import check
from attn_core.spec.model import AttentionSpec, Group

SINK_FLAGS = ("learnable_sink", "use_sinks", "use_attention_sinks", "attention_sink_bias", "add_attention_sink_bias")
"""Booleans by which a config says that its softmax has a learned per-head sink."""


def read(v: View, **traits: Any) -> dict[str, Group]:
    """Groups ``full``, ``sliding``, ``chunked`` and ``linear`` of a decoder, as far as it has them.

    ``traits`` are fields of :class:`AttentionSpec` that the model code fixes whatever the config says.
    """
    base = attention(v, **traits)
    has = kinds(v)
    variants: dict[str, Group] = {"full": base}
    if any("indexed" in kind for kind in has):
        if base.sparse == "none":
            raise BadInputError(f"{v.name}: indexed_attention is read only with kv_lora_rank and index_topk (DSA)")
        if any("full" in kind for kind in has):
            variants |= {"full": replace(base, sparse="none", topk=None), "indexed": base}
        else:
            has = tuple(("full",) for _ in has)
    if any("sliding" in kind for kind in has):
        if base.attn_type == "encoder_only" and two_sided(v) != "all":
            raise BadInputError(f"{v.name}: is_causal=False with a sliding_window: does it count one side or both?")
        variants["sliding"] = replace(base, sliding_window=window(v))
    if any("chunked" in kind for kind in has):
        variants["chunked"] = replace(base, attention_chunk=v.size("attention_chunk_size"))
    if any("linear" in kind for kind in has):
        variants["linear"] = linear(v)
    return collect((i, name, variants[name]) for i, kind in enumerate(has) for name in kind)


def attention(v: View, **traits: Any) -> AttentionSpec:
    """The softmax attention that the layers share, before windows."""
    spec = mla.attention(v) if v.get("kv_lora_rank") else _heads(v)
    stated = {
        "attn_type": "decoder" if causal(v) else "encoder_only",
        "bidirectional_prefix": two_sided(v) == "vision",
        "scale": scale(v) or spec.scale,
        "logit_softcap": v.get("attn_logit_softcapping"),
        "sinks": sinks(v),
        "dual_chunk": dual_chunk(v),
    }
    return replace(spec, **{**stated, **traits})


def _heads(v: View) -> AttentionSpec:
    v.need("num_attention_heads", *(() if v.get("head_dim") else ("hidden_size",)), "num_hidden_layers")
    heads, kv, single = v.size("num_attention_heads"), v.get("num_key_value_heads"), v.flag("multi_query")
    if kv is None and single:
        kv = 1
    if not v.flag("multi_query_attention", True):  # ChatGLM states a group count even where it has no groups
        kv = heads
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads if kv is None else v.size("num_key_value_heads", kv),
        head_dim=v.head_dim,
        v_head_dim=v.size("v_head_dim", v.head_dim),
        dtype=v.dtype,
        alibi_slopes=slopes(heads) if v.flag("alibi") else None,
    )


def scale(v: View) -> float | None:
    """What multiplies q·k when it is not 1/sqrt(head_dim); None when it is.

    ``query_pre_attn_scalar`` (Gemma) enters as its inverse root, ``attention_multiplier`` (Granite) as it is, and
    GPT-2 can turn scaling off. Two of them at once contradict each other.
    """
    found = {name: v.get(name) for name in ("query_pre_attn_scalar", "attention_multiplier")}
    stated = {name: value for name, value in found.items() if value is not None}
    if v.flag("scale_attn_by_inverse_layer_idx"):
        raise BadInputError(f"{v.name}: scale_attn_by_inverse_layer_idx gives every layer its own scale; not supported")
    if not v.flag("scale_attn_weights", True):
        stated["scale_attn_weights"] = False
    if len(stated) > 1:
        raise BadInputError(f"{v.name}: {' and '.join(stated)} both set the attention scale")
    for name, value in stated.items():
        if value is False:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise BadInputError(f"{v.name}: {name}={value!r} must be a positive number")
        return float(value**-0.5 if name == "query_pre_attn_scalar" else value)
    return None


def sinks(v: View) -> bool:
    """Whether any generic flag says that all layers have learned sinks."""
    stated = {name: v.get(name) for name in SINK_FLAGS}
    flags = [check.flag(v.name, name, value) for name, value in stated.items() if value is not None]
    return any(flags)


def dual_chunk(v: View) -> int | None:
    """Tokens of a chunk of dual chunk attention, which the config states with the local part that overlaps.

    ``sparse_attention_config`` is for the sparse estimate by which engines approximate it beyond a length; that is
    another kernel's promise, the attention that the model means is this one. Defaults as in vLLM and SGLang
    (dual_chunk_flash_attn.py at 006e0ac; dual_chunk_flashattention_backend.py at 1951f6a).
    """
    stated = v.sub("dual_chunk_attention_config")
    if stated is None:
        return None
    inner = View(stated, parent=v)
    chunk, local = inner.size("chunk_size", 8192), inner.count("local_size", 1024)
    if local >= chunk:
        raise BadInputError(f"{v.name}: dual_chunk_attention_config has local_size={local}, chunk_size={chunk}")
    return chunk - local


def causal(v: View) -> bool:
    """False for embedding models built from a decoder: ``is_causal`` false, or two-sided by flag or by name."""
    return v.flag("is_causal", True) and two_sided(v) != "all" and "bidirectional" not in v.architecture.lower()


def two_sided(v: View) -> str | None:
    """What ``use_bidirectional_attention`` (Gemma 3, 4) says: ``all`` tokens, those of images (``vision``), or None."""
    value = v.get("use_bidirectional_attention")
    if value not in (None, False, True, "all", "vision"):
        raise BadInputError(f"{v.name}: use_bidirectional_attention={value!r} must be true, false, 'all' or 'vision'")
    return "all" if value in (True, "all") else "vision" if value == "vision" else None
