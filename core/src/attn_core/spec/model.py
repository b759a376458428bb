"""What a model asks of attention: groups of layers that share one kind of attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from attn_core.errors import BadInputError
from attn_core.spec import check

if TYPE_CHECKING:
    from pathlib import Path

Form = Literal["absorbed", "materialised"]

_ROLES = {
    "encoder_only": ("encode",),
    "decoder": ("prefill", "decode", "kv_write"),
    "cross": ("prefill", "decode", "kv_write"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One group of layers with the same softmax attention, before sharding.

    Widths are in elements, windows and chunks in tokens. ``scale`` multiplies q·k; None means ``1/sqrt(head_dim)``
    with the *model's* width (MLA: ``nope_dim + rope_dim``), whatever width a kernel pads to.
    Raises :class:`BadInputError` for sizes that contradict each other.
    """

    num_heads: int
    head_dim: int
    dtype: str
    num_kv_heads: int = 0
    """0 means as many as ``num_heads`` (MHA)."""
    v_head_dim: int = 0
    """0 means ``head_dim``."""
    kind: str = "mha"
    attn_type: str = "decoder"
    latent_dim: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    scale: float | None = None
    sliding_window: int | None = None
    attention_chunk: int | None = None
    dual_chunk: int | None = None
    """Dual chunk attention: tokens of a chunk. A query comes as three tensors, turned for keys of its own chunk, of the
    one before, and of all earlier ones; one softmax over all of them. How much a long context sharpens it is no
    business of kernels: engines put that factor into q and k (arXiv 2501.15383)."""
    bidirectional_prefix: bool = False
    logit_softcap: float | None = None
    sinks: bool = False
    alibi_slopes: tuple[float, ...] | None = None
    bias: bool = False
    sparse: str = "none"
    topk: int | None = None
    kv_from: str | None = None
    """Name of the group whose cache these layers read instead of writing their own (shared-KV layers)."""
    layers: tuple[int, ...] = ()
    """Layer indices of the group; empty when unknown."""

    def __post_init__(self) -> None:
        where = "AttentionSpec"
        put = object.__setattr__
        put(self, "dtype", check.dtype(where, self.dtype))
        check.size(where, "num_heads", self.num_heads)
        check.size(where, "head_dim", self.head_dim)
        check.size(where, "num_kv_heads", self.num_kv_heads, least=0)
        check.size(where, "v_head_dim", self.v_head_dim, least=0)
        put(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        put(self, "v_head_dim", self.v_head_dim or self.head_dim)
        check.choice(where, "kind", self.kind, ("mha", "mla"))
        check.choice(where, "attn_type", self.attn_type, _ROLES)
        check.choice(where, "sparse", self.sparse, ("none", "dsa"))
        sizes = ("latent_dim", "rope_dim", "nope_dim", "sliding_window", "attention_chunk", "dual_chunk", "topk")
        for name in sizes:
            check.size(where, name, getattr(self, name), optional=True, least=0 if name.endswith("_dim") else 1)
        for name in ("sinks", "bias", "bidirectional_prefix"):
            check.flag(where, name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise BadInputError(
                f"{where}: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        for name in ("scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise BadInputError(f"{where}: {name}={value!r} must be a positive finite number or None")
        if self.alibi_slopes is not None:
            put(self, "alibi_slopes", tuple(float(s) for s in self.alibi_slopes))
            if len(self.alibi_slopes) != self.num_heads:
                raise BadInputError(f"{where}: {len(self.alibi_slopes)} alibi_slopes for {self.num_heads} heads")
        if self.kind == "mla":
            if not self.latent_dim or self.rope_dim is None or not self.nope_dim:
                raise BadInputError(f"{where}: kind='mla' needs latent_dim, rope_dim and nope_dim")
            if self.head_dim != self.nope_dim + self.rope_dim:
                raise BadInputError(
                    f"{where}: mla head_dim={self.head_dim} must be nope_dim + rope_dim, "
                    f"{self.nope_dim} + {self.rope_dim}"
                )
            if self.attn_type != "decoder":
                raise BadInputError(f"{where}: kind='mla' is decoder attention, not {self.attn_type}")
        narrowed = self.sliding_window is not None or self.attention_chunk is not None
        if self.dual_chunk is not None and (self.kind != "mha" or self.attn_type != "decoder" or narrowed):
            raise BadInputError(
                f"{where}: dual_chunk is for causal mha decoders without sliding_window and attention_chunk; got "
                f"kind={self.kind!r}, attn_type={self.attn_type!r}, sliding_window={self.sliding_window}, "
                f"attention_chunk={self.attention_chunk}"
            )
        if self.sparse == "dsa" and not self.topk:
            raise BadInputError(f"{where}: sparse='dsa' needs topk, the number of indices per query")
        layers = tuple(self.layers)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers) or len(set(layers)) < len(
            layers
        ):
            raise BadInputError(f"{where}: layers={layers} must be distinct non-negative indices")
        put(self, "layers", layers)

    @property
    def roles(self) -> tuple[str, ...]:
        return _ROLES[self.attn_type]

    @property
    def cached(self) -> bool:
        """Whether the group keeps a KV cache."""
        return self.attn_type != "encoder_only"

    @property
    def causal(self) -> bool:
        return self.attn_type == "decoder"

    @property
    def softmax_scale(self) -> float:
        """What multiplies q·k: ``scale``, or 1/sqrt of the model's own head_dim."""
        return self.scale if self.scale is not None else self.head_dim**-0.5

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def head_dims(self) -> tuple[int, int]:
        return (self.head_dim, self.v_head_dim)

    @property
    def custom_scale(self) -> bool:
        return not math.isclose(self.softmax_scale, self.head_dim**-0.5, rel_tol=1e-6)

    def facts(self, form: str | None = None) -> dict[str, object]:
        """The group as a kernel of this ``form`` sees it; keys are the group-scope names of ``FIELDS``.

        Absorbed MLA runs on the latent cache: one kv head of ``latent_dim + rope_dim`` against ``latent_dim``.
        """
        heads_kv, d, dv = self.num_kv_heads, self.head_dim, self.v_head_dim
        if self.kind == "mla" and form == "absorbed" and self.latent_dim is not None and self.rope_dim is not None:
            heads_kv, d, dv = 1, self.latent_dim + self.rope_dim, self.latent_dim
        elif self.kind == "mla":
            heads_kv = self.num_heads
        return {
            "kind": self.kind,
            "attn_type": self.attn_type,
            "dtype": self.dtype,
            "head_dim": d,
            "v_head_dim": dv,
            "head_dims": (d, dv),
            "unequal_v": d != dv,
            "num_heads": self.num_heads,
            "num_kv_heads": heads_kv,
            "group_size": self.num_heads // heads_kv,
            "latent_dim": self.latent_dim,
            "rope_dim": self.rope_dim,
            "nope_dim": self.nope_dim,
            "custom_scale": self.custom_scale,
            "sliding_window": self.sliding_window,
            "attention_chunk": self.attention_chunk,
            "dual_chunk": self.dual_chunk,
            "bidirectional_prefix": self.bidirectional_prefix,
            "logit_softcap": self.logit_softcap,
            "sinks": self.sinks,
            "alibi": self.alibi_slopes is not None,
            "bias": self.bias,
            "sparse": self.sparse,
            "topk": self.topk,
        }

    def sharded(self, ranks: int) -> AttentionSpec:
        """The part one tensor-parallel rank holds. kv heads are split, or replicated when there are fewer than ranks.

        ``alibi_slopes`` stay whole: a decision is the same for all ranks, bind slices them by rank.
        """
        if ranks == 1:
            return self
        if self.num_heads % ranks:
            raise BadInputError(f"num_heads={self.num_heads} cannot be split over tensor_parallel={ranks} ranks")
        kv = self.num_kv_heads
        if kv % ranks and ranks % kv:
            raise BadInputError(
                f"num_kv_heads={kv} can neither be split over nor replicated to tensor_parallel={ranks} ranks"
            )
        slopes, heads = self.alibi_slopes, self.num_heads // ranks
        return replace(
            self,
            num_heads=heads,
            num_kv_heads=max(1, kv // ranks),
            scale=self.scale,
            alibi_slopes=None if slopes is None else slopes[:heads],
        )

    def to_json(self) -> dict[str, object]:
        return _plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionSpec:
        slopes = data.get("alibi_slopes")
        return cls(
            **{
                **data,
                "layers": tuple(data.get("layers", ())),
                "alibi_slopes": None if slopes is None else tuple(slopes),
            }
        )


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One group of linear-attention layers of a hybrid model: decided here, run by the engine's own kernels."""

    kind: str
    """gdn (gated delta net), kda (Kimi delta attention) or mamba2."""
    num_heads: int
    """Key heads (gdn, kda) or SSM heads (mamba2)."""
    head_dim: int
    dtype: str
    num_v_heads: int = 0
    v_head_dim: int = 0
    state_dim: int | None = None
    """mamba2: ssm_state_size."""
    conv_kernel: int | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = "LinearSpec"
        put = object.__setattr__
        check.choice(where, "kind", self.kind, ("gdn", "kda", "mamba2"))
        put(self, "dtype", check.dtype(where, self.dtype))
        check.size(where, "num_heads", self.num_heads)
        check.size(where, "head_dim", self.head_dim)
        check.size(where, "num_v_heads", self.num_v_heads, least=0)
        check.size(where, "v_head_dim", self.v_head_dim, least=0)
        check.size(where, "state_dim", self.state_dim, optional=True)
        check.size(where, "conv_kernel", self.conv_kernel, optional=True)
        put(self, "num_v_heads", self.num_v_heads or self.num_heads)
        put(self, "v_head_dim", self.v_head_dim or self.head_dim)
        put(self, "layers", tuple(self.layers))

    roles = ("linear_prefill", "linear_decode")
    cached = False

    def facts(self, form: str | None = None) -> dict[str, object]:
        return {
            "kind": self.kind,
            "attn_type": "decoder",
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
            "head_dims": (self.head_dim, self.v_head_dim),
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_v_heads,
        }

    def sharded(self, ranks: int) -> LinearSpec:
        if ranks == 1:
            return self
        if self.num_heads % ranks or self.num_v_heads % ranks:
            raise BadInputError(
                f"{self.kind} heads {self.num_heads}/{self.num_v_heads} cannot be split over "
                f"tensor_parallel={ranks} ranks"
            )
        return replace(self, num_heads=self.num_heads // ranks, num_v_heads=self.num_v_heads // ranks)

    def to_json(self) -> dict[str, object]:
        return {"linear": True, **_plain(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinearSpec:
        fields: dict[str, Any] = {k: tuple(v) if k == "layers" else v for k, v in data.items() if k != "linear"}
        return cls(**fields)


Group = AttentionSpec | LinearSpec


def _plain(spec: Any) -> dict[str, object]:
    out: dict[str, object] = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as its attention: named groups of layers.

    ``notes`` say what was assumed while reading an unknown architecture; a decision repeats them.
    """

    groups: Mapping[str, Group]
    architecture: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        groups = dict(self.groups)
        if not groups:
            raise BadInputError("ModelSpec: a model needs at least one group of attention layers")
        for name, g in groups.items():
            if not isinstance(name, str) or not name:
                raise BadInputError(f"ModelSpec: group name {name!r} must be a non-empty string")
            if not isinstance(g, AttentionSpec | LinearSpec):
                raise BadInputError(f"ModelSpec: group {name!r} is {type(g).__name__}, not AttentionSpec or LinearSpec")
            source = getattr(g, "kv_from", None)
            if source is not None and source not in groups:
                raise BadInputError(f"ModelSpec: group {name!r} takes its KV from unknown group {source!r}")
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "notes", tuple(self.notes))

    def __hash__(self) -> int:
        return hash((self.architecture, tuple(self.groups.items())))

    @cached_property
    def _layer_groups(self) -> dict[int, str]:
        """Decoder layer index -> group. A decoder layer's self-attention wins over its cross attention; towers and
        drafts count their own layers, so their groups are asked for by name, unless the model is only an encoder."""
        own = {n: g for n, g in self.groups.items() if not n.startswith("draft.")}
        rank = {"decoder": 0, "cross": 1}
        has_decoder = any(getattr(g, "attn_type", "decoder") in rank for g in own.values())
        out: dict[int, str] = {}
        for name, g in sorted(own.items(), key=lambda item: rank.get(getattr(item[1], "attn_type", "decoder"), 2)):
            if not has_decoder or "encode" not in g.roles:
                for i in g.layers:
                    out.setdefault(i, name)
        return out

    def group_of(self, layer: int) -> str:
        """Name of the group a layer index belongs to; raises :class:`BadInputError` for a layer no group lists."""
        if layer in self._layer_groups:
            return self._layer_groups[layer]
        if len(self.groups) == 1:
            return next(iter(self.groups))
        raise BadInputError(
            f"layer {layer} belongs to no group of {self.architecture or 'the model'}: {list(self.groups)}"
        )

    def sharded(self, ranks: int) -> ModelSpec:
        return self if ranks == 1 else replace(self, groups={n: g.sharded(ranks) for n, g in self.groups.items()})

    def with_draft(self, draft: ModelSpec) -> ModelSpec:
        """Join a draft model's groups under ``draft.*`` so that page size and cache dtype are solved together."""
        joined = {**self.groups, **{f"draft.{n}": _rename_source(g) for n, g in draft.groups.items()}}
        return replace(self, groups=joined, notes=self.notes + draft.notes)

    @classmethod
    def of(cls, spec: Group | Mapping[str, Group] | ModelSpec | None = None, /, **spec_fields: Any) -> ModelSpec:
        """Read what a caller may pass: a model, one group, named groups, or the fields of an AttentionSpec."""
        if isinstance(spec, ModelSpec):
            return spec
        if spec is None:
            _known(spec_fields)
            spec = AttentionSpec(**spec_fields)
        if isinstance(spec, AttentionSpec):
            return cls(groups={{"encoder_only": "encoder", "cross": "cross"}.get(spec.attn_type, "full"): spec})
        if isinstance(spec, LinearSpec):
            return cls(groups={"linear": spec})
        if isinstance(spec, Mapping):
            return cls(groups=spec)
        raise BadInputError(f"expected a ModelSpec, an AttentionSpec or its fields, got {type(spec).__name__}")

    @classmethod
    def from_hf_config(cls, config: str | Path | Mapping[str, Any] | Any) -> ModelSpec:
        """Read a Hugging Face ``config.json`` path, its dict, or a ``PretrainedConfig``. See ``attn_core.models``."""
        from attn_core.models import read_hf_config

        return read_hf_config(config)

    def to_json(self) -> dict[str, object]:
        return {
            "architecture": self.architecture,
            "groups": {n: g.to_json() for n, g in self.groups.items()},
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        groups: dict[str, Group] = {
            n: LinearSpec.from_json(g) if g.get("linear") else AttentionSpec.from_json(g)
            for n, g in data["groups"].items()
        }
        return cls(groups=groups, architecture=data.get("architecture", ""), notes=tuple(data.get("notes", ())))


def _rename_source(group: Group) -> Group:
    if isinstance(group, AttentionSpec) and group.kv_from is not None:
        return replace(group, kv_from=f"draft.{group.kv_from}")
    return group


def _known(names: Iterable[str]) -> None:
    known = {f.name for f in fields(AttentionSpec)}
    for name in names:
        if name not in known:
            raise BadInputError(f"AttentionSpec has no field {name!r}{check.nearest(name, known)}")
    for name in ("num_heads", "head_dim", "dtype"):
        if name not in names:
            raise BadInputError(f"AttentionSpec needs {name}; give at least num_heads, head_dim and dtype")
