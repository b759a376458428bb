"""Groups bound to the Triton kernels on CPU tensors: resolved for a device of the table, run by the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from attn_core.backends import triton
from attn_core.backends.triton import config, schedule
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.domain import OneOf
from attn_core.resolve import resolve
from attn_core.runtime import BoundGroup
from attn_core.runtime.backend import bind_decision
from attn_core.spec import AttentionSpec, Device, EngineOptions, ModelSpec

SM75, SM90 = (Device(platform="cuda", arch=arch) for arch in ("sm_75", "sm_90"))


def bind(spec: AttentionSpec, form: str | None = None, mla_query: str | None = None, device: Device = SM90,
         **options: Any) -> BoundGroup:  # fmt: skip
    """Resolve among Triton's rows (of one MLA form, one layout of q) and bind on the CPU."""
    chosen = [r for r in triton.backends(device) if form is None or r.role != "prefill" or r.form == form]
    if mla_query is not None:
        narrow = OneOf(mla_query)
        chosen = [replace(r, accepts={**r.accepts, "mla_query": narrow}) if r.form else r for r in chosen]
    catalog = Catalog({str(device): DeviceCatalog(tuple(chosen))})
    installed = Installed({"triton": "3.9.0"})
    decision = resolve(device, ModelSpec.of(spec), EngineOptions(**options), catalog, installed)
    (group,) = bind_decision(decision, "cpu").groups.values()
    assert {b.backend for b in group.bindings.values()} == {"triton"}
    return group


SMALL = (16, 16, 4)
"""block_m, block_n, warps: so small that short sequences take several blocks of keys."""


@contextmanager
def tiled(tile: tuple[int, int, int], fewest_keys: int | None = None) -> Iterator[None]:
    """What is bound and planned inside uses this tile for every shape, and pieces of as few keys as said."""
    with pytest.MonkeyPatch().context() as p, pieces(fewest_keys):
        p.setattr(config, "tile", lambda *_, **__: config.Tile(*tile))
        yield


@contextmanager
def pieces(fewest_keys: int | None) -> Iterator[None]:
    """What is planned inside cuts keys into pieces of as few as said; None: as always."""
    with pytest.MonkeyPatch().context() as p:
        if fewest_keys is not None:
            p.setattr(schedule, "FEWEST_KEYS", fewest_keys)
        yield
