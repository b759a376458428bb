"""The vocabulary as one table. The judge, the docs, the CLI and "not claimed means refused" all read it.

A field's ``default`` is what a backend that says nothing about it accepts. For semantic fields that is the plain
value only (a *feature* is a boolean whose default is ``{False}``), so a new field is refused by every old plugin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attn_core.domain import ANY, Domain, OneOf
from attn_core.spec.check import DTYPES, KV_CACHE_DTYPES

Scope = Literal["group", "cached", "model", "engine", "device", "claim"]

LAYOUTS = ("NHD", "HND", "MLA", "MLA_SPLIT", "DSA_FP8")
GRAPHS = ("full", "decode", "piecewise", "none")
PAGE_SIZES = (16, 32, 64, 128, 8, 256, 512, 1024, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    scope: Scope
    type: type
    default: Domain | None
    """None: every backend must state it."""
    unit: str
    doc: str
    choices: tuple[str, ...] = ()
    settled: bool = False
    """A value the resolver chooses, rather than a fact it is given."""
    unknown_passes: bool = False
    """A fact that may be unknown when resolving; then the plan checks it."""

    @property
    def is_feature(self) -> bool:
        """Refused unless claimed: the default holds only the plain value."""
        return self.default is not None and self.default.values is not None and not self.settled


PLAIN = OneOf(None)
OFF = OneOf(False)

_TABLE = (
    # facts of one layer group -------------------------------------------------------------------------------------
    Field("kind", "group", str, OneOf("mha"), "", "kernel family", ("mha", "mla", "gdn", "kda", "mamba2")),
    Field("attn_type", "group", str, OneOf("decoder"), "", "causal decoder, encoder_only, or cross attention",
          ("decoder", "encoder_only", "cross")),
    Field("dtype", "group", str, None, "", "dtype of q, k, v and the output", DTYPES),
    Field("head_dim", "group", int, ANY, "elements", "width of q and k as the kernel sees it (MLA: by form)"),
    Field("v_head_dim", "group", int, ANY, "elements", "width of v and the output as the kernel sees it"),
    Field("head_dims", "group", tuple, ANY, "elements", "the pair (head_dim, v_head_dim); where only pairs work"),
    Field("unequal_v", "group", bool, OFF, "", "v_head_dim differs from head_dim (materialised MLA, MiMo)"),
    Field("num_heads", "group", int, ANY, "heads", "query heads on one rank"),
    Field("num_kv_heads", "group", int, ANY, "heads", "key/value heads on one rank (absorbed MLA: 1)"),
    Field("group_size", "group", int, ANY, "heads", "query heads per key/value head"),
    Field("latent_dim", "group", int, ANY, "elements", "MLA latent width (kv_lora_rank)", unknown_passes=True),
    Field("rope_dim", "group", int, ANY, "elements", "MLA rotary width", unknown_passes=True),
    Field("nope_dim", "group", int, ANY, "elements", "MLA non-rotary width", unknown_passes=True),
    Field("custom_scale", "group", bool, OFF, "", "scale differs from 1/sqrt(model head_dim)"),
    Field("sliding_window", "group", int, PLAIN, "tokens", "W tokens, the token itself included; encoder: |i-j| < W"),
    Field("attention_chunk", "group", int, PLAIN, "tokens", "keys of the query's own chunk only (Llama 4)"),
    Field("dual_chunk", "group", int, PLAIN, "tokens", "a chunk's length; keys of a token's own chunk, of the one "
          "before and of earlier ones each meet a query of their own (Qwen2.5-1M)"),
    Field("bidirectional_prefix", "group", bool, OFF, "", "spans attend in both directions (Gemma 3 images)"),
    Field("logit_softcap", "group", float, PLAIN, "", "cap * tanh(logits / cap) before the mask"),
    Field("sinks", "group", bool, OFF, "", "a learned per-head logit joins the softmax denominator"),
    Field("alibi", "group", bool, OFF, "", "per-head linear position bias (alibi_slopes)"),
    Field("bias", "group", bool, OFF, "", "an additive bias tensor (T5 relative positions)"),
    Field("sparse", "group", str, OneOf("none"), "", "token-sparse attention by indices", ("none", "dsa")),
    Field("topk", "group", int, ANY, "tokens", "indices per query of sparse attention", unknown_passes=True),
    # values settled per group -------------------------------------------------------------------------------------
    Field("kv_layout", "group", str, OneOf("NHD"), "", "memory layout of the group's KV cache", settled=True),
    Field("mla_query", "group", str, OneOf("packed"), "", "absorbed MLA: q as one tensor or (latent, rope)",
          ("packed", "split"), settled=True),
    # values shared by all groups that have a cache ----------------------------------------------------------------
    Field("page_size", "cached", int, ANY, "tokens", "tokens per KV page", settled=True),
    Field("kv_cache_dtype", "cached", str, OneOf("auto"), "", "storage dtype of the cache; auto = the group's dtype",
          KV_CACHE_DTYPES, settled=True),
    # value of the whole model -------------------------------------------------------------------------------------
    Field("graph", "model", str, OneOf("piecewise", "none"), "", "how much of a step device graphs may capture",
          GRAPHS, settled=True),
    # what the engine asks for -------------------------------------------------------------------------------------
    Field("deterministic", "engine", bool, OFF, "", "bitwise equal results whatever else is in the batch"),
    Field("lse", "engine", bool, OFF, "", "natural-log sum of exponentials can be returned"),
    Field("verify_width", "engine", int, OneOf(1), "tokens", "query tokens per decode row (speculative verify)"),
    Field("tree_mask", "engine", bool, OFF, "", "verify rows carry a tree mask"),
    Field("host_lengths", "engine", str, OneOf("exact"), "", "host knows exact kv lengths, or bounds only",
          ("exact", "bounds")),
    Field("tensor_parallel", "engine", int, ANY, "ranks", "tensor-parallel ranks"),
    Field("world_size", "engine", int, ANY, "ranks", "ranks in all"),
    Field("kv_offload_io", "engine", str, ANY, "", "who moves offloaded KV", ("none", "kernel", "direct")),
    Field("max_model_len", "engine", int, ANY, "tokens", "longest sequence", unknown_passes=True),
    Field("max_num_seqs", "engine", int, ANY, "sequences", "most sequences in a batch", unknown_passes=True),
    # facts of the device ------------------------------------------------------------------------------------------
    Field("device.arch", "device", str, ANY, "", "exact architecture"),
    Field("device.total_memory", "device", int, ANY, "bytes", "device memory", unknown_passes=True),
    Field("device.shared_memory_per_block", "device", int, ANY, "bytes", "shared memory of a block",
          unknown_passes=True),
    # what a kernel does beyond the minimum; read by the runtime, never demanded by a model ------------------------
    Field("appends", "claim", bool, OFF, "", "the kernel writes the new k, v itself"),
    Field("native_out", "claim", bool, OFF, "", "out= is filled without a copy where its memory has no gaps"),
    Field("strided_out", "claim", bool, OFF, "", "and where it has gaps between rows and heads"),
)  # fmt: skip

FIELDS: dict[str, Field] = {f.name: f for f in _TABLE}

LOCAL = tuple(f.name for f in _TABLE if f.settled and f.scope == "group")
SHARED = ("graph", "kv_cache_dtype", "page_size")
FEATURES = tuple(f.name for f in _TABLE if f.is_feature and f.scope != "claim")
CLAIMS = tuple(f.name for f in _TABLE if f.scope == "claim")

_WRITER = {
    "kind", "dtype", "head_dim", "v_head_dim", "head_dims", "unequal_v", "num_kv_heads", "latent_dim", "rope_dim",
    *LOCAL, *SHARED, "device.arch", "device.total_memory", "device.shared_memory_per_block",
}  # fmt: skip
_LINEAR = {
    "kind", "dtype", "head_dim", "v_head_dim", "head_dims", "num_heads", "num_kv_heads", "graph", "deterministic",
    "verify_width", "tree_mask", "tensor_parallel", "world_size", "max_model_len", "max_num_seqs", "device.arch",
}  # fmt: skip
_DECODE_ONLY = {"verify_width", "tree_mask"}
_CACHE = {*LOCAL, *SHARED, "kv_offload_io"} - {"graph"}

RELEVANT: dict[str, frozenset[str]] = {
    "decode": frozenset(FIELDS),
    "prefill": frozenset(FIELDS) - _DECODE_ONLY,
    "encode": frozenset(FIELDS) - _DECODE_ONLY - _CACHE,
    "kv_write": frozenset(_WRITER),
    "linear_prefill": frozenset(_LINEAR) - _DECODE_ONLY,
    "linear_decode": frozenset(_LINEAR),
    "allreduce_fusion": frozenset({"dtype", "graph", "deterministic", "tensor_parallel", "world_size", "device.arch"}),
}
"""Which fields a role is judged on. A writer of pages does not care about sinks, a prefill not about verify widths."""
