"""Steps whose launches are compiled: one per kernel that differs in kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from aot import Launch, recorded

from attn_core.backends import triton
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.errors import NoBackendError
from attn_core.resolve import resolve
from attn_core.runtime import Batch, BoundGroup
from attn_core.runtime.backend import bind_decision
from attn_core.runtime.plan import ContextChunk
from attn_core.spec import AttentionSpec, Device, EngineOptions, ModelSpec


def heads(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", **fields})


MLA = AttentionSpec(
    kind="mla", num_heads=128, nope_dim=128, rope_dim=64, head_dim=192, v_head_dim=128, latent_dim=512, dtype="bfloat16"
)
ENCODER = heads(attn_type="encoder_only", num_heads=12, num_kv_heads=12, head_dim=32)


@dataclass(frozen=True)
class Case:
    """One launch of one step."""

    spec: AttentionSpec
    role: str
    form: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def launches(self, arch: str) -> list[Launch]:
        """What the product launches; raises NoBackendError where the rows do not claim it."""
        return _record(bind(self.spec, arch, self.form, **self.options), self.role)


CASES: dict[str, Case] = {
    "decode 128": Case(heads(), "decode"),
    "decode 64, sinks, window": Case(heads(num_heads=64, head_dim=64, sinks=True, sliding_window=128), "decode"),
    "decode 256, softcap": Case(heads(num_heads=16, head_dim=256, logit_softcap=50.0), "decode"),
    "decode 96": Case(heads(head_dim=96, num_kv_heads=32), "decode"),
    "decode 512": Case(heads(head_dim=512, num_kv_heads=4), "decode"),
    "decode 128, fp8": Case(heads(), "decode", options={"kv_cache_dtype": "fp8_e4m3"}),
    "decode 128, int8": Case(heads(), "decode", options={"kv_cache_dtype": "int8"}),
    "verify 128, tree": Case(heads(), "decode", options={"verify_width": 4, "tree_mask": True}),
    "decode MLA": Case(MLA, "decode", "absorbed"),
    "prefill 128": Case(heads(), "prefill"),
    "prefill 64, sinks, window": Case(heads(num_heads=64, head_dim=64, sinks=True, sliding_window=128), "prefill"),
    "prefill 256, softcap": Case(heads(num_heads=16, head_dim=256, logit_softcap=50.0), "prefill"),
    "prefill 512": Case(heads(head_dim=512, num_kv_heads=4), "prefill"),
    "prefill 128, fp8": Case(heads(), "prefill", options={"kv_cache_dtype": "fp8_e4m3"}),
    "prefill MLA 192/128": Case(MLA, "prefill", "materialised"),
    "prefill MLA 576/512": Case(MLA, "prefill", "absorbed"),
    "encode 32": Case(ENCODER, "encode"),
    "prefill 128, chunk, spans": Case(heads(attention_chunk=8192, bidirectional_prefix=True), "prefill"),
    "decode 128, alibi, bias": Case(heads(num_heads=8, alibi_slopes=(0.5,) * 8, bias=True), "decode"),
    "decode MLA, sparse": Case(replace(MLA, sparse="dsa", topk=2048), "decode"),
    "encode 64, bias, window": Case(
        heads(attn_type="encoder_only", num_kv_heads=32, head_dim=64, bias=True, sliding_window=64), "encode"
    ),
    "decode 128, float32": Case(heads(dtype="float32"), "decode"),
    "merge 128": Case(heads(), "merge"),
    "merge_state 128": Case(heads(), "merge_state"),
    "write 128": Case(heads(), "write"),
    "write 128, fp8": Case(heads(), "write", options={"kv_cache_dtype": "fp8_e4m3"}),
    "gather MLA": Case(MLA, "gather", "materialised"),
}


SHARED = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_110": 227,
    "sm_120": 99, "sm_121": 99, "gfx90a": 64, "gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1201": 64, "gfx1250": 160,
}  # fmt: skip
"""KiB of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities; AMD ISA guides)."""
ARCHS = tuple(SHARED)


def refused(name: str, arch: str) -> bool:
    """Whether the rows for an arch do not claim a case."""
    try:
        CASES[name].launches(arch)
    except NoBackendError:
        return True
    return False


def device(arch: str) -> Device:
    return Device(platform="cuda" if arch.startswith("sm_") else "rocm", arch=arch)


def bind(
    spec: AttentionSpec, arch: str, form: str | None = None, torch_device: str = "cpu", **options: Any
) -> BoundGroup:
    """Among Triton's rows for an arch (of one MLA form), bound where nothing can run: only to record launches."""
    where = device(arch)
    rows = [r for r in triton.backends(where) if form is None or r.role != "prefill" or r.form == form]
    catalog = Catalog({str(where): DeviceCatalog(tuple(rows))})
    options = {} if spec.attn_type == "encoder_only" else {"page_size": 16, **options}
    decision = resolve(where, ModelSpec.of(spec), EngineOptions(**options), catalog, Installed({"triton": "3.9.0"}))
    (group,) = bind_decision(decision, torch_device).groups.values()
    return group


def _record(group: BoundGroup, role: str) -> list[Launch]:
    s, dtype = group.spec, getattr(torch, group.spec.dtype)
    width = group.options.verify_width if role in ("decode", "merge") else 300
    queries, keys = [width] * 2, [3000, 300]
    with recorded() as seen:
        if role == "encode":
            q = torch.empty(600, s.num_heads, s.head_dim, dtype=dtype)
            bias = torch.empty(1, s.num_heads, 300, 300, dtype=dtype) if s.bias else None
            group.forward(q, q, q, None, group.plan(Batch([300, 300], attn_type="encoder_only")), bias=bias)
            return seen[:1]
        tree = torch.eye(width, dtype=torch.bool).expand(2, -1, -1) if group.options.tree_mask else None
        batch = Batch(
            queries, keys, block_table=torch.ones(2, 192, dtype=torch.int32), tree_mask=tree, decode_width=width,
            slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        )  # fmt: skip
        if role in ("prefill", "write", "gather", "merge_state"):
            spans = [[(2750, 2900)], []] if s.bidirectional_prefix else None
            batch = Batch(
                queries, keys, block_table=batch.block_table, slot_mapping=batch.slot_mapping, bidirectional_spans=spans
            )
        plan, cache = group.plan(batch), group.new_kv_cache(2)
        tokens = sum(queries)
        if role == "merge_state":
            o, lse = torch.empty(tokens, s.num_heads, s.v_head_dim, dtype=dtype), torch.empty(tokens, s.num_heads)
            group.merge_state(o.float(), lse, o, lse)
        elif role == "write":
            k = torch.empty(tokens, s.num_kv_heads, s.head_dim, dtype=dtype)
            group.write_kv(k, k, cache, plan)
        elif role == "gather":
            lens = torch.tensor(keys, dtype=torch.int32)
            group.gather_kv(cache, plan, ContextChunk(
                starts=lens * 0, lens=lens, block_table=batch.block_table, page_size=16, plan=plan,
                batch=batch.ragged(lens, causal=False),
            ))  # fmt: skip
        else:
            attend: Callable[..., Any] = group.prefill if role == "prefill" else group.decode
            latent = group.bindings["prefill" if role == "prefill" else "decode"].form == "absorbed"
            q = torch.empty(tokens, s.num_heads, 576 if latent else s.head_dim, dtype=dtype)
            k = torch.empty(tokens, s.num_heads, s.head_dim, dtype=dtype)
            sinks = torch.empty(s.num_heads) if s.sinks else None
            bias = torch.empty(1, s.num_heads, width, 4000, dtype=dtype) if s.bias else None
            indices = torch.zeros(tokens, s.topk or 0, dtype=torch.int32) if s.topk else None
            attend(
                q, k, k[..., : s.v_head_dim], cache, plan, sinks=sinks, bias=bias, indices=indices,
                return_lse=role == "prefill",
            )  # fmt: skip
    return [seen[-1]] if role == "merge" else seen[:1]
