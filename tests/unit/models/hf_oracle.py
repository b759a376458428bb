"""What transformers' own modelling code asks of attention, recorded per layer by running it without weights.

A model is built on the meta device with an attention function that notes its arguments, so a full-size forward costs
milliseconds. Masks are kept as index functions and probed afterwards for how far a query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

NAME = "attn_core_oracle"
FAR = 60_000
"""Position of the probed query; windows and chunks of the models under test are shorter."""


@dataclass(frozen=True)
class Call:
    """One attention call, as the model made it. ``window`` counts the token itself; None where all keys are seen."""

    module: str
    layer: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float | None
    sinks: bool
    bias: bool
    sparse: bool
    causal: bool
    window: int | None


_calls: list[tuple[dict[str, Any], Callable[..., Any] | None]] = []


def _attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **kw: Any) -> Any:
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    facts = {
        "module": type(module).__name__,
        "layer": getattr(module, "layer_idx", None),
        "num_heads": q.shape[1],
        "num_kv_heads": k.shape[1],
        "head_dim": q.shape[-1],
        "v_head_dim": v.shape[-1],
        "scale": scale,
        "softcap": kw.get("softcap"),
        "sinks": kw.get("s_aux") is not None,
        "bias": kw.get("position_bias") is not None,
        "sparse": kw.get("indices") is not None,
    }
    _calls.append((facts, getattr(mask, "rule", None)))
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None


def _mask(batch_size: int, q_length: int, kv_length: int, mask_function: Any = None, **kw: Any) -> Any:
    mask = torch.zeros(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.rule = mask_function
    return mask


transformers.AttentionInterface.register(NAME, _attend)
transformers.AttentionMaskInterface.register(NAME, _mask)


def _materialise(rule: Callable[..., Any]) -> None:
    """Paddings that a mask function closed over are zeros; give them values where they sit on the meta device."""
    for cell in rule.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, torch.Tensor) and held.is_meta:
            cell.cell_contents = torch.zeros(held.shape, dtype=held.dtype)
        for inner in held if isinstance(held, tuple) else (held,):
            if callable(inner) and hasattr(inner, "__closure__"):
                _materialise(inner)


def _reach(rule: Callable[..., Any] | None) -> tuple[int | None, bool]:
    """(window, causal) of a mask: what the query at position FAR sees. No mask at all means every key."""
    if rule is None:
        return None, False
    _materialise(rule)
    zero = torch.zeros((), dtype=torch.long)
    seen = rule(zero, zero, torch.full((1,), FAR), torch.arange(2 * FAR)).expand(2 * FAR).nonzero().flatten()
    first, last = int(seen[0]), int(seen[-1])
    return (FAR - first + 1 if first else None), last == FAR


def record(config: Any, **inputs: tuple[int, ...]) -> list[Call]:
    """Every attention call of one forward over nine tokens. ``inputs`` are shapes of further float or id tensors."""
    _calls.clear()
    with torch.device("meta"), torch.no_grad():
        model = transformers.AutoModel.from_config(config, attn_implementation=NAME).eval().to(torch.bfloat16)
        extra = {
            name: torch.zeros(shape, dtype=torch.long if name.endswith("ids") else torch.bfloat16)
            for name, shape in inputs.items()
        }
        model(**({} if "input_features" in inputs else {"input_ids": torch.zeros(1, 9, dtype=torch.long)}), **extra)
    out = []
    for facts, rule in _calls:
        window, causal = _reach(rule)
        out.append(Call(**facts, window=window, causal=causal))
    return out
