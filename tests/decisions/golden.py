"""Every model on a row of devices, one line per decision. ``python tests/decisions/golden.py`` rewrites the table.

Review its diff like code: a line that changes is a decision that users get differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attn_core import ModelSpec, NoBackendError, simulate
from attn_core.spec import ACCOMPANYING, Decision

HERE = Path(__file__).parent
TABLE = HERE / "golden.txt"
MODELS = sorted((HERE.parent / "data" / "models").glob("*.json"))
DEVICES = (
    "cpu:avx2", "cpu:amx_bf16", "cuda:sm_75", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_110", "cuda:sm_121",
    "rocm:gfx942", "rocm:gfx1201", "musa:mp31", "ascend:910b",
)  # fmt: skip


def lines() -> Iterator[str]:
    platforms = [simulate(d) for d in DEVICES]
    for path in MODELS:
        model = ModelSpec.from_hf_config(path)
        for name, platform in zip(DEVICES, platforms):
            try:
                decision = platform.resolve(model)
            except NoBackendError as e:
                yield f"{path.stem:<24}{name:<14}{e.code}"
            else:
                yield f"{path.stem:<24}{name:<14}{brief(decision)}"


def brief(d: Decision) -> str:
    """``group: prefill/decode`` of every softmax-attention group, then the shared values."""
    parts = []
    for name, g in d.groups.items():
        if "linear_decode" in g.choices:
            continue
        chosen = [c for role, c in g.choices.items() if role not in ACCOMPANYING]
        pads = "".join(f" {c.padded_from}->{c.head_dim}" for c in chosen[:1] if c.padded_from)
        layout = g.values.get("kv_layout", "")
        layout = "" if layout == "NHD" else f" {layout}".rstrip()
        parts.append(f"{name}: {'/'.join(c.backend for c in chosen)}{pads}{layout}")
    values = [str(d.values[n]) for n in ("page_size", "kv_cache_dtype", "graph") if n in d.values]
    return f"{', '.join(parts)} | {' '.join(values)}"


if __name__ == "__main__":
    TABLE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
