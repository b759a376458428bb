"""Attention variants that FlashInfer compiles for a wrapper: the one that applies sinks.

A binary belongs to its name in the whole process: whoever asks for that name later gets the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from simulators.contract import Misuse, Refused

SINK_SOURCES = {path: f"struct AttentionSink, {path}" for path in ("fa2", "fa3")}
"""What ``flashinfer.jit.attention.variants.attention_sink_decl`` holds."""
LOADED: dict[str, tuple[Any, ...]] = {}
"""Name -> what its binary was compiled from: of this process, as the loader's."""


class Variant:
    """One compiled variant, as a wrapper holds it."""

    def __init__(self, backend: str, args: Sequence[Any], options: Mapping[str, Any] | None) -> None:
        names = (
            "name", "dtype_q", "dtype_kv", "dtype_o", "idtype", "head_dim_qk", "head_dim_vo", "tensors", "tensor_types",
            "scalars", "scalar_types", "variant", "source",
        )  # fmt: skip
        if len(args) != len(names):
            raise Refused(f"jit_args are {', '.join(names)}; got {len(args)}")
        self.made = SimpleNamespace(**dict(zip(names, args)))
        if self.made.source != SINK_SOURCES[backend] or self.made.variant != "AttentionSink":
            raise Refused(f"the variant does not compile for {backend}")
        if (self.made.tensors, self.made.scalars) != (["sink"], ["sm_scale"]):
            raise Refused("the source reads params.sink and params.sm_scale, which are not declared")
        self.windowed = bool((options or {}).get("use_sliding_window", False))
        of = (backend, *map(str, args[1:]), self.windowed)
        if LOADED.setdefault(self.made.name, of) != of:
            raise Misuse(f"{self.made.name} is loaded for {LOADED[self.made.name]} and would run for {of}")

    def check_plan(self, where: str, p: SimpleNamespace, dtypes: tuple[Any, Any], head_dims: tuple[int, int]) -> None:
        m = self.made
        if (m.dtype_q, m.dtype_kv, (m.head_dim_qk, m.head_dim_vo)) != (*dtypes, head_dims):
            raise Misuse(f"{where}: {dtypes} of {head_dims} for a binary of {m.dtype_q} and {m.head_dim_qk}")
        if p.logits_soft_cap or p.custom_mask is not None or p.packed_custom_mask is not None:
            raise Misuse(f"{where}: the variant with sinks drops soft caps and custom masks")
        if (p.window_left >= 0) != self.windowed:
            raise Misuse(f"{where}: window_left={p.window_left} for a binary with use_sliding_window={self.windowed}")

    def arguments(self, given: Sequence[Any], q: Tensor, planned: float | None) -> tuple[Tensor, float]:
        """Sinks and scale out of what ``run`` was given behind the cache."""
        sinks = given[0] if given else None
        if sinks is None:
            raise Misuse("run: without sinks the kernel reads a null pointer")
        if str(sinks.dtype) != "torch.float32" or tuple(sinks.shape) != (q.shape[1],) or not sinks.is_contiguous():
            raise Misuse(f"run: sinks are read as float32 ({q.shape[1]},), got {sinks.dtype} {tuple(sinks.shape)}")
        default = q.shape[-1] ** -0.5 if planned is None else planned
        return sinks, given[1] if len(given) > 1 else default


def named_without_width(a: SimpleNamespace) -> list[Any]:
    """What BatchAttentionWithAttentionSinkWrapper hands on."""
    dtype = str(a.q_data_type).removeprefix("torch.")
    return [
        f"batch_prefill_attention_sink_{dtype}_swa_{a.window_left >= 0}_{a.backend}", a.q_data_type, a.kv_data_type,
        a.q_data_type, "int32", a.head_dim_qk, a.head_dim_vo, ["sink"], ["float"], ["sm_scale"], ["double"],
        "AttentionSink", SINK_SOURCES[a.backend],
    ]  # fmt: skip
