"""A group bound to real kernels on a real device, judged by the float64 reference over steps made on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_core import NoBackendError
from attn_core.platform import Platform
from attn_core.runtime import BoundGroup, Capture
from attn_core.testing.compare import differences
from numerics.kernel_cases import Lengths, Step, bind, cross_step, encode_step, step
from simulators.device.run import moved

MHA: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
MLA: dict[str, Any] = {
    "kind": "mla", "num_heads": 16, "head_dim": 192, "nope_dim": 128, "rope_dim": 64, "v_head_dim": 128,
    "latent_dim": 512, "dtype": "bfloat16",
}  # fmt: skip
DECODE = Lengths((1, 1, 1, 1), (9, 1, 37, 1500))
PREFILL = Lengths((5, 7, 4, 170), (30, 7, 41, 300))
MIXED = Lengths((1, 1, 1, 5, 7, 64), (9, 1, 700, 5, 30, 64))
VERIFY = Lengths((3, 3, 3), (9, 3, 1400))
CROSS = Lengths((1, 1, 6, 3), (9, 130, 4, 20))
RAGGED = Lengths((5, 1, 17, 300), (5, 1, 17, 300))

CASES: dict[str, dict[str, Any]] = {
    "decode": {"lengths": DECODE},
    "prefill": {"lengths": PREFILL},
    "mixed": {},
    "float16": {"spec": {"dtype": "float16"}},
    **{f"width {d}": {"spec": {"head_dim": d}} for d in (64, 96, 192, 256)},
    "scale": {"spec": {"scale": 0.3}},
    "softcap": {"spec": {"logit_softcap": 5.0}},
    "sinks": {"spec": {"sinks": True}},
    **{f"window {w}": {"spec": {"sliding_window": w}} for w in (2, 33)},
    "sinks and window": {"spec": {"sinks": True, "sliding_window": 17}},
    "one kv head": {"spec": {"num_kv_heads": 1}},
    "lse": {"options": {"lse": True}},
    "page 64": {"options": {"page_size": 64}},
    "page 1": {"options": {"page_size": 1}},
    "verify": {"lengths": VERIFY, "options": {"verify_width": 3}, "batch": {"decode_width": 3}},
    "cross": {"spec": {"attn_type": "cross"}, "lengths": CROSS},
    "encoder": {"spec": {"attn_type": "encoder_only"}, "lengths": RAGGED},
    "small encoder": {"spec": {"attn_type": "encoder_only", "head_dim": 32}, "lengths": RAGGED},
    "mla decode": {"spec": MLA, "lengths": DECODE},
    "mla decode, lse": {"spec": MLA, "lengths": DECODE, "options": {"lse": True}},
    "mla 128 heads": {"spec": {**MLA, "num_heads": 128}, "lengths": DECODE},
    **{f"{d} cache": {"options": {"kv_cache_dtype": d}} for d in ("fp8_e4m3", "fp8_e5m2")},
    "mla fp8 cache": {"spec": MLA, "lengths": DECODE, "options": {"kv_cache_dtype": "fp8_e4m3"}},
    "deterministic": {"options": {"deterministic": True}},
}
GRAPHS: dict[str, dict[str, Any]] = {
    "graph": {},
    "graph, window": {"spec": {"sliding_window": 33}},
    "graph, sinks": {"spec": {"sinks": True}},
    "graph, mla": {"spec": MLA},
    "graph, verify": {"options": {"verify_width": 3}, "batch": {"decode_width": 3}},
}
"""Decode steps; the first is captured, both are replayed."""
EIGHT_BIT = frozenset({"fa3", "fa4", "flashmla", "trtllm_mha", "trtllm_mla", "cutlass_mla", "cutedsl_mla"})
"""Backends that want q in 8 bits, too, over a cache of 8 bits."""
PUBLIC = ("NHD", "HND", "MLA", "MLA_SPLIT")


class Refused(Exception):  # noqa: N818
    """The backend does not serve this case here, for the reason given."""


@dataclass(frozen=True)
class Judged:
    """A case that ran."""

    found: list[str]
    """What is wrong; empty when nothing is."""
    through: dict[str, str]
    """Role -> the bind function, and the form of MLA, that the decision names."""


def judged(platform: Platform, backend: str, case: dict[str, Any]) -> Judged:
    """``backend`` on the case. Raises :class:`Refused`."""
    group, through = bound(platform, backend, case)
    made = moved(on_host(group, case), group)
    if group.materialised and made.batch.num_decode_tokens < made.batch.num_tokens:
        raise Refused("its prefill is materialised MLA, which is no single forward")
    lse = bool(case.get("options", {}).get("lse"))
    got = made.run(return_lse=lse)
    want, want_lse = made.want()
    out, sums = got if lse else (got, None)
    ulps = precision(backend, group)
    found = differences(out, want, out.dtype, lse=sums, want_lse=want_lse if lse else None, ulps=ulps)
    return Judged(found, {role: through[role] for role in made.plan.kept if role in through})


def precision(backend: str, group: BoundGroup) -> float:
    """Units in the last place of the output. Kernels that multiply in 8 bits round probabilities to 3 bits."""
    return 48.0 if backend in EIGHT_BIT and group.kv_dtype == torch.float8_e4m3fn else 3.0


def bound(platform: Platform, backend: str, case: dict[str, Any]) -> tuple[BoundGroup, dict[str, str]]:
    """The case's group of ``backend``, and what each role is bound by. Raises :class:`Refused`."""
    spec, options = asked(case), case.get("options", {})
    role = "backend" if spec.get("kind") != "mla" else "decode_backend"
    try:
        attn = platform.attention_backend(**spec, **options, **{role: backend}, allow_reference=True)
    except NoBackendError as e:
        mine = [r.text for r in e.rejections if r.backend == backend]
        raise Refused("; ".join(dict.fromkeys(mine)) or e.text) from None
    ((name, group),) = attn.groups.items()
    if group.kv_layout not in (None, *PUBLIC):
        raise Refused(f"layout {group.kv_layout} is its own; attn-core bench checks it through its own writer")
    chosen = attn.decision.groups[name].choices
    return group, {role: " ".join(filter(None, (c.bind, c.form))) for role, c in chosen.items()}


def asked(case: dict[str, Any]) -> dict[str, Any]:
    return {**MHA, **case.get("spec", {})}


def replayed(platform: Platform, backend: str, case: dict[str, Any]) -> Judged:
    """A decode step captured in a graph, then replayed over its own and over a smaller step with other lengths."""
    width = case.get("batch", {}).get("decode_width", 1)
    lengths = [Lengths((width,) * len(kv), kv) for kv in ((9, 1500, 37, 64, 400, 5), (1800, 3, 700, 20))]
    group, through = bound(platform, backend, {**case, "options": {**case.get("options", {}), "graph": "decode"}})
    steps = [moved(on_host(group, {**case, "lengths": some}), group) for some in lengths]
    first, extra = steps[0], dict(steps[0].extra)
    if "sinks" in extra:
        extra["sinks"] = group.prepare_sinks(extra["sinks"])

    cache = group.new_kv_cache(max(s.cache.data[0].shape[0] for s in steps))
    *q, k, v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in parts(first))
    out = torch.empty_like(first.run())

    def place(made: Step) -> None:
        for mine, given in zip((*q, k, v, *cache.data), (*parts(made), *made.cache.data)):
            mine[: given.shape[0]].copy_(given)

    def forward() -> None:
        group.forward(q[0] if len(q) == 1 else tuple(q), k, v, cache, plan, out=out, **extra)

    plan = group.plan(first.batch, capture=Capture(max_seqs=6, decode_width=width, max_kv_len=2000))
    place(first)
    replay, found = captured(forward), []
    for made in steps:
        place(made)
        plan = group.plan(made.batch, out=plan)
        out.fill_(float("nan"))
        replay()
        want, _ = replace(made, cache=cache, extra=first.extra).want()
        found += differences(out[: want.shape[0]], want, out.dtype, ulps=3.0)
    return Judged(found, {"decode": through["decode"]})


def captured(forward: Callable[[], None]) -> Callable[[], None]:
    """What replays ``forward`` from a graph. First a run on another stream, in which libraries set themselves up."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        forward()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


def parts(step: Step) -> tuple[Any, ...]:
    return (*(step.q if isinstance(step.q, tuple) else (step.q,)), step.k, step.v)


def on_host(group: BoundGroup, case: dict[str, Any]) -> Step:
    """The step on the CPU, of a group of core's own kernels with the same cache."""
    pins = {n: getattr(group, n) for n in ("page_size", "kv_layout", "kv_cache_dtype") if group.spec.cached}
    pins["kv_cache_dtype"] = None if pins.get("kv_cache_dtype") == group.spec.dtype else pins.get("kv_cache_dtype")
    options = {**case.get("options", {}), **{k: v for k, v in pins.items() if v is not None}}
    host = bind(group.spec, mla_query=group.mla_query if group.spec.kind == "mla" else None, **options)
    lengths, fields = case.get("lengths", MIXED), case.get("batch", {})
    if group.spec.attn_type == "encoder_only":
        return encode_step(host, lengths)
    if group.spec.attn_type == "cross":
        return cross_step(host, lengths)
    made = step(host, lengths, **fields)
    if (
        group.kv_dtype == torch.float8_e4m3fn
    ):  # what 8 bits hold exactly: rounding q is the caller's bargain, no mistake
        for q in parts(made)[:-2]:
            q.copy_(q.to(torch.float8_e4m3fn))
    return made
