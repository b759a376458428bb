"""Architectures nobody has told us about: best effort from common fields, said so, and nothing ignored."""

from __future__ import annotations

import re
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models import dense, encoder
from attn_core.models.layers import window
from attn_core.models.view import View
from attn_core.spec.model import Group

SEMANTIC = re.compile(
    r"window|soft_?cap|logit_cap|sink(?!horn)|lora_rank|attention_chunk|alibi|relative_(attention|pos)|position_bias"
    r"|cross_attention|bidirectional|causal|prefix_lm|kv_shar|shared?_kv|use_cla|sparse_attention|block_sparse"
    r"|index_(topk|n_heads|head_dim)|^swa_|_swa_|per_layer_config|block_configs|layers?_(block_)?types?$|hybrid"
    r"|ssm|mamba|state_size|softmax_scale|qk_scale|scale_attn|linear_(attn|num|key|value|head)"
    r"|attn_(type|layer|config|pattern|scale)|attention_(types?|layers|pattern|scale)"
    r"|dual_chunk|v_head_dim|qk_(nope|rope)|(global|local)_(attn|attention|head_dim)|dilat|full_attention"
    r"|multi_query|position_embedding_type"
)
"""Names of fields that change which keys a query sees, or how their logits are formed."""

HARMLESS = re.compile(
    r"^(final|output|router|moe|mlp|lm_head|expert|conv|vision|audio|image|video|token)_|mlp_layer_types|temperature"
    r"|rope_theta|_dtype$|hidden_act$|^use_mamba_kernels$"
    r"|^mamba_(proj_bias|conv_bias|n_groups|expand|chunk_size|dt_\w+|rms_norm)$"
)
"""Names that match above, but mean other parts of a model."""

_PLAIN_POSITIONS = ("rope", "rotary", "absolute", "learned", "none", "nope")


def read(v: View) -> dict[str, Group]:
    """A causal decoder (an encoder if named ``...ForMaskedLM`` or ``...Bert...``) from common fields, with a note.

    Raises :class:`BadInputError` for missing fields, for encoder-decoders, and for set fields that would change the
    attention in a way this reader does not know.
    """
    if v.inherited("is_encoder_decoder") is True:
        raise BadInputError(f"{v.name} is not known, and two stacks of an encoder-decoder cannot be guessed")
    masked = v.architecture.endswith("ForMaskedLM") or "bert" in v.architecture.lower()
    groups = encoder.read(v) if masked else dense.read(v)
    positions = v.get("position_embedding_type")
    if isinstance(positions, str) and positions.lower() not in _PLAIN_POSITIONS:
        raise BadInputError(f"{v.name} is not known, and its position_embedding_type={positions!r} may bias attention")
    if "sliding" in groups and not dense.causal(v):
        raise BadInputError(
            f"{v.name} is not known, and whether its two-sided sliding_window counts both sides is open"
        )
    if set(groups) == {"sliding"} and v.get("layer_types") is None:
        v.note(f"its sliding_window={window(v)} is taken to hold in every layer")
    if v.inherited("vision_config"):
        v.note("its image tokens are taken to be causal like text")
    common = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "num_hidden_layers")
    what = "bidirectional encoder" if masked else "dense causal decoder" if dense.causal(v) else "bidirectional decoder"
    v.note(
        f"architecture {v.name} is not known; read as a {what} from "
        + ", ".join(name for name in common if v.get(name) is not None)
    )
    return groups


def refuse_unread(v: View) -> None:
    """Refuse a config of unknown model code with set fields that may change attention and that nobody has read."""
    view: View | None = v
    while view is not None:
        unread = [f"{k}={_short(x)}" for k, x in view.data.items() if k not in view.used and _active(str(k), x)]
        if unread:
            raise BadInputError(
                f"{v.name} is not known, and its {', '.join(unread[:3])} may change attention in a way that cannot be "
                "guessed; describe the groups with AttentionSpec instead"
            )
        view = view.parent


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _active(name: str, value: Any) -> bool:
    switched_off = value is None or value is False or value in (0, "", "none") or value == [] or value == {}
    return not switched_off and bool(SEMANTIC.search(name)) and not HARMLESS.search(name)
