"""Asks the real command, ``attn-core resolve --json``, with the real plugins, in this process."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attn_core import cli
from attn_core.platform import installed_plugins

MODELS = Path(__file__).parents[1] / "data" / "models"


@dataclass(frozen=True)
class Answer:
    """What the command said: its exit status and its one object."""

    status: int
    data: dict[str, Any]

    def chosen(self, group: str = "full") -> tuple[str, ...]:
        """Backends of the group's attention roles: prefill and decode, or encode."""
        roles = self.data["groups"][group]
        return tuple(roles[r]["backend"] for r in ("encode", "prefill", "decode") if r in roles)

    @property
    def everywhere(self) -> set[str]:
        """Every attention backend of every group."""
        return {b for name in self.data["groups"] for b in self.chosen(name)}

    @property
    def everywhere_full(self) -> set[str]:
        """Attention backends of hybrid models' full layers."""
        return set(self.chosen("full"))

    @property
    def values(self) -> dict[str, Any]:
        values: dict[str, Any] = self.data["values"]
        return values

    def reasons(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rejections with these fields, whether the command answered or refused."""
        found = self.data["rejections"] if self.status == 0 else self.data["error"]["rejections"]
        return [r for r in found if all(r[k] == v for k, v in wanted.items())]


def ask(model: str | Path, device: str, *args: str) -> Answer:
    """``model``: a name in ``tests/data/models``, or a file. Bad input (status 2) is an error of the test."""
    path = model if isinstance(model, Path) else MODELS / f"{model}.json"
    printed = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "answer", lambda: printed)
        try:
            cli.main(["resolve", "--model", str(path), "--device", device, *args, "--json"])
        except SystemExit as e:
            status = int(e.code or 0)
    assert status in (0, 3), (status, printed.getvalue())
    return Answer(status, json.loads(printed.getvalue()))


def claimants(device: str, role: str, **facts: Any) -> set[str]:
    """Backends with a row for this role whose declared domains hold these facts; a field left out claims nothing."""
    (dev,) = (d for p in installed_plugins().platforms().values() for d in p.known if str(d) == device)
    rows = installed_plugins().catalog((dev,)).devices[device].backends
    return {r.backend for r in rows if r.role == role and all(v in r.accepts.get(f, ()) for f, v in facts.items())}


def config(folder: Path, base: str, **changes: Any) -> Path:
    """A copy of one of the models' configs with some fields changed; None takes one out."""
    data = {**json.loads((MODELS / f"{base}.json").read_text()), **changes}
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


CUDA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
EVERYWHERE = (
    *(f"cuda:{arch}" for arch in CUDA),
    *(f"rocm:{arch}" for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1200", "gfx1201", "gfx1250")),
    "musa:mp22", "musa:mp31", "ascend:910b", "ascend:910c", "ascend:950", "ascend:310p", "xpu:bmg", "xpu:pvc",
    "cpu:avx2", "cpu:avx512_bf16", "cpu:amx_bf16", "cpu:neon",
)  # fmt: skip
