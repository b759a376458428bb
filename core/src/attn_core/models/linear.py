"""Linear-attention layers: gated delta net (Qwen3-Next, Qwen3.5), KDA (Kimi-Linear), Mamba-2 (Nemotron-H, Bamba)."""

from __future__ import annotations

from attn_core.errors import BadInputError
from attn_core.models.view import View
from attn_core.spec.model import LinearSpec

GDN = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
KDA = ("linear_num_heads", "linear_head_dim")
MAMBA2 = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size")


def linear(v: View) -> LinearSpec:
    """The linear layers of a model, told apart by the fields that only one kind has."""
    nested = v.sub("linear_attn_config")
    if nested is not None:
        return _kda(View(nested, parent=v), "num_heads", "head_dim", "short_conv_kernel_size")
    if v.get(KDA[0]) is not None:
        return _kda(v, *KDA, "linear_conv_kernel_dim")
    if v.get(GDN[0]) is not None:
        v.need(*GDN)
        return LinearSpec(
            kind="gdn",
            num_heads=v.size(GDN[0]),
            head_dim=v.size(GDN[1]),
            num_v_heads=v.size(GDN[2]),
            v_head_dim=v.size(GDN[3]),
            conv_kernel=v.get("linear_conv_kernel_dim"),
            dtype=v.dtype,
        )
    if v.get(MAMBA2[0]) is not None:
        v.need(*MAMBA2)
        return LinearSpec(
            kind="mamba2",
            num_heads=v.size(MAMBA2[0]),
            head_dim=v.size(MAMBA2[1]),
            state_dim=v.size(MAMBA2[2]),
            conv_kernel=v.get("conv_kernel"),
            dtype=v.dtype,
        )
    raise BadInputError(
        f"{v.name}: its linear layers are of no kind we know; gdn has {GDN[0]}, kda has {KDA[0]} or "
        f"linear_attn_config, mamba2 has {MAMBA2[0]}"
    )


def _kda(v: View, heads: str, width: str, conv: str) -> LinearSpec:
    v.need(heads, width)
    return LinearSpec(
        kind="kda", num_heads=v.size(heads), head_dim=v.size(width), conv_kernel=v.get(conv), dtype=v.dtype
    )
