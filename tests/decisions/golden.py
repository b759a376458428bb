"""Every model on every known device, one line per decision with the devices that share it.

``python tests/decisions/golden.py`` rewrites the table. Review its diff like code: a line that changes is a decision
that users get differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from attn_core import Device, ModelSpec, NoBackendError, simulate
from attn_core.platform import installed_plugins
from attn_core.spec import ACCOMPANYING, Decision

HERE = Path(__file__).parent
TABLE = HERE / "golden.txt"
MODELS = sorted((HERE.parent / "data" / "models").glob("*.json"))


def devices() -> list[Device]:
    """Every device that some plugin describes, in order of name."""
    return sorted((d for p in installed_plugins().platforms().values() for d in p.known), key=str)


def lines() -> Iterator[str]:
    platforms = [simulate(d) for d in devices()]
    for path in MODELS:
        model = ModelSpec.from_hf_config(path)
        found: dict[str, list[str]] = {}
        for platform in platforms:
            try:
                answer = brief(platform.resolve(model))
            except NoBackendError as e:
                answer = e.code
            found.setdefault(answer, []).append(str(platform.device))
        yield path.stem
        for answer, where in found.items():
            yield f"  {', '.join(_by_platform(where))}"
            yield f"    {answer}"


def _by_platform(names: list[str]) -> Iterator[str]:
    """``cuda:sm_80 sm_86`` for several devices of one platform."""
    for platform, group in groupby(names, key=lambda n: n.partition(":")[0]):
        yield f"{platform}:{' '.join(n.partition(':')[2] for n in group)}"


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
