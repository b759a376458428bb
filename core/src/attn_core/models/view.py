"""One config (sub)dict under one set of names. Models spell the same field in many ways; families use ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attn_core.errors import BadInputError
from attn_core.spec import check

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed", "dim"),
    "head_dim": ("head_dim", "attention_head_dim", "d_kv", "d_head", "kv_channels", "head_size"),
    "dtype": ("dtype", "torch_dtype"),
    "rope": ("rope_parameters", "rope_scaling"),
    "layer_types": ("layer_types", "layers_block_type"),
    "sliding_window": ("sliding_window", "sliding_window_size"),
    "attn_logit_softcapping": ("attn_logit_softcapping", "attn_logit_softcap", "attn_logits_soft_cap"),
    "mamba_num_heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba_head_dim": ("mamba_head_dim", "mamba_d_head"),
    "ssm_state_size": ("ssm_state_size", "mamba_d_state"),
    "conv_kernel": ("conv_kernel", "mamba_d_conv"),
}
"""Our name for a field -> how configs spell it, first match wins."""

STATED = ("hidden_size", "num_attention_heads", "num_hidden_layers")
"""Sizes that a config at top level always states; ``save_pretrained`` drops them from nested configs only."""

TEXT_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Where composite configs keep the language model."""


class View:
    """Read access to one config under our names, with the class defaults of its model type behind it.

    ``used`` collects the keys that were looked up, whether present or not, so that a reader of an unknown
    architecture can tell which fields nobody asked for. ``notes`` is shared by all views of one model.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        kind: str = "",
        defaults: Mapping[str, Any] | None = None,
        parent: View | None = None,
    ) -> None:
        self.data = data
        self.kind = kind
        """Model type by which a family tells its members apart."""
        self.defaults = defaults or {}
        self.parent = parent
        self.architecture: str = parent.architecture if parent else ""
        self.notes: list[str] = parent.notes if parent else []
        self.used: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field under any of its spellings; an explicit null is None and hides the class default."""
        spellings = SPELLINGS.get(name, (name,))
        self.used.update(spellings)
        present = [key for key in spellings if key in self.data]
        for key in present:
            if self.data[key] is not None:
                return self.data[key]
        if not present and name in self.defaults and (self.parent is not None or name not in STATED):
            return self.defaults[name]
        return default

    def need(self, *names: str) -> tuple[Any, ...]:
        """Values of fields that must be there; one :class:`BadInputError` names all that are missing."""
        values = tuple(self.get(name) for name in names)
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        if missing:
            them = "it" if len(missing) == 1 else "them"
            raise BadInputError(
                f"{self.name}: missing {', '.join(missing)}; the config must state {them} (found: {self._found()})"
            )
        return values

    def size(self, name: str, default: int | None = None) -> int:
        """A field that must be a positive integer."""
        value = self.get(name, default)
        if value is None:
            self.need(name)
        return int(check.size(self.name, name, value))

    def count(self, name: str, default: int | None = None) -> int:
        """A field that must be an integer of at least 0."""
        value = self.get(name, default)
        if value is None:
            self.need(name)
        return int(check.size(self.name, name, value, least=0))

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that must be true or false."""
        return check.flag(self.name, name, self.get(name, default))

    def _found(self) -> str:
        keys = sorted(str(k) for k in self.data)
        return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") if keys else "nothing"

    def sub(self, *names: str) -> Mapping[str, Any] | None:
        """The first nested dict among ``names``; a nested config object counts as its dict."""
        for name in names:
            self.used.add(name)
            value = self.data.get(name)
            if value is not None and not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):
                value = value.to_dict()
            if isinstance(value, Mapping):
                return value
        return None

    def inherited(self, name: str) -> Any:
        """A field of this config, else of the config around it."""
        value = self.get(name)
        return value if value is not None or self.parent is None else self.parent.inherited(name)

    def but(self, **changes: Any) -> View:
        """The same view with some fields set."""
        view = View({**self.data, **changes}, kind=self.kind, defaults=self.defaults, parent=self.parent)
        view.architecture, view.notes, view.used = self.architecture, self.notes, self.used
        return view

    @property
    def name(self) -> str:
        """What messages call the model."""
        return self.architecture or self.kind or "config"

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def dtype(self) -> str:
        """Computation dtype. A config that states none is taken as bfloat16, which engines serve, and noted."""
        value = self.inherited("dtype")
        if value in (None, "auto"):
            self.note("the config states no dtype; bfloat16 is assumed, in which engines serve such models")
            return "bfloat16"
        return check.dtype(self.name, value)

    @property
    def layers(self) -> int:
        return self.size("num_hidden_layers")

    @property
    def head_dim(self) -> int:
        """Stated width of a head, else hidden_size over heads."""
        if self.get("head_dim") is not None:
            return self.size("head_dim")
        self.need("num_attention_heads", "hidden_size")
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        if hidden % heads:
            raise BadInputError(
                f"{self.name}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and no head_dim "
                "is stated"
            )
        return hidden // heads

    def indices(self, name: str) -> tuple[int, ...]:
        """A list of layer indices."""
        (value,) = self.need(name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise BadInputError(f"{self.name}: {name}={value!r} must be a list of layer indices")
        return tuple(int(check.size(self.name, name, i, least=0)) for i in value)
