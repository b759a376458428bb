"""A group bound to real kernels on a real device, judged by the float64 reference over steps made on the host."""

from __future__ import annotations

from typing import Any

from attn_core import NoBackendError
from attn_core.platform import Platform
from attn_core.runtime import BoundGroup
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
}
PUBLIC = ("NHD", "HND", "MLA", "MLA_SPLIT")


class Refused(Exception):  # noqa: N818
    """The backend does not serve this case here, for the reason given."""


def judged(platform: Platform, backend: str, case: dict[str, Any]) -> list[str]:
    """What is wrong with ``backend`` on the case; empty when nothing is. Raises :class:`Refused`."""
    spec, options = {**MHA, **case.get("spec", {})}, case.get("options", {})
    role = "backend" if spec.get("attn_type") == "encoder_only" or spec.get("kind") != "mla" else "decode_backend"
    try:
        attn = platform.attention_backend(**spec, **options, **{role: backend}, allow_reference=True)
    except NoBackendError as e:
        mine = [r.text for r in e.rejections if r.backend == backend]
        raise Refused("; ".join(dict.fromkeys(mine)) or e.text) from None
    (group,) = attn.groups.values()
    if group.kv_layout not in (None, *PUBLIC):
        raise Refused(f"layout {group.kv_layout} is its own; attn-core bench checks it through its own writer")
    made = moved(on_host(group, case), group)
    lse = bool(options.get("lse"))
    got = made.run(return_lse=lse)
    want, want_lse = made.want()
    out, sums = got if lse else (got, None)
    return differences(out, want, out.dtype, lse=sums, want_lse=want_lse if lse else None, ulps=3.0)


def on_host(group: BoundGroup, case: dict[str, Any]) -> Step:
    """The step on the CPU, of a group of core's own kernels with the same cache."""
    pins = {n: getattr(group, n) for n in ("page_size", "kv_layout", "kv_cache_dtype") if group.spec.cached}
    pins["kv_cache_dtype"] = None if pins.get("kv_cache_dtype") == group.spec.dtype else pins.get("kv_cache_dtype")
    options = {**case.get("options", {}), **{k: v for k, v in pins.items() if v is not None}}
    host = bind(group.spec, mla_query=group.mla_query if group.spec.kind == "mla" else None, **options)
    lengths, fields = case.get("lengths", MIXED), case.get("batch", {})
    if group.spec.attn_type == "encoder_only":
        return encode_step(host, lengths)
    return cross_step(host, lengths) if group.spec.attn_type == "cross" else step(host, lengths, **fields)
