"""Tiles fit their architectures by the table's own arithmetic; unknown ones get modest tiles; what fits none raises."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attn_core.backends import triton
from attn_core.backends.triton import config
from attn_core.backends.triton.widths import parts
from attn_core.errors import AttnCoreError
from attn_core.spec import Device, Tier

SHAPES = [(d, d, False) for d in (16, 32, 64, 72, 96, 128, 192, 256, 512)] + [(192, 128, False), (576, 512, True)]
FAMILIES = [(platform, f) for platform, found in config.FAMILIES.items() for f in found]


@pytest.mark.parametrize(
    ("platform", "found"), FAMILIES, ids=lambda x: x if isinstance(x, str) else min(x.archs, default="any")
)
def test_tiles_fit(platform, found):
    for d, dv, joined in SHAPES:
        q, v = parts(d), parts(dv)
        for itemsize in (2, 4):
            for rows in (None, 1, 8, 128):
                try:
                    t = config.tile(found, q, v, joined=joined, itemsize=itemsize, stored=itemsize, rows=rows)
                except AttnCoreError:
                    assert joined or d > config.widest(found, itemsize)
                    continue
                assert config.shared(t, q, v, found, joined=joined, itemsize=itemsize, stored=itemsize) <= found.shared
                assert {t.block_m & (t.block_m - 1), t.block_n & (t.block_n - 1)} == {0}
                assert min(t.block_m, t.block_n) >= 16


@pytest.mark.parametrize(
    ("width", "expected"),
    [(16, (16, 0)), (24, (32, 0)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)),
     (192, (128, 64)), (576, (512, 64))],
)  # fmt: skip
def test_widths_are_a_power_of_two_and_a_rest(width, expected):
    assert parts(width)[1:] == expected


def test_an_unknown_arch_gets_what_the_most_modest_one_of_its_platform_gets():
    assert config.family("cuda", "sm_999") is config.family("cuda", "sm_75")
    assert config.family("cuda", "sm_999", 200 * 1024).shared == 200 * 1024
    assert {r.role for r in triton.backends(Device(platform="cuda", arch="sm_999"))} >= {"prefill", "decode", "encode"}


def test_a_shape_that_fits_nowhere_is_refused_with_its_limits():
    with pytest.raises(AttnCoreError, match=r"no tile for head_dim=2048.*65536 bytes"):
        config.tile(
            config.family("cuda", "sm_75"), parts(2048), parts(2048), joined=False, itemsize=2, stored=2, rows=None
        )


def test_a_latent_in_halves_wants_its_room_too():
    found = config.family("cuda", "sm_999", 48 * 1024)
    assert not config.serves_latent(found, 2)
    assert config.serves_latent(config.family("cuda", "sm_75"), 2)


@pytest.mark.parametrize("platform", ["cpu", "musa", "ascend"])
def test_platforms_without_rows(platform):
    """The interpreter is no product, and the others' Tritons are forks that nothing was compiled with."""
    assert not list(triton.backends(Device(platform=platform, arch="x")))


def test_rows_are_portable_and_before_flex_attention():
    rows = list(triton.backends(Device(platform="cuda", arch="sm_90")))
    assert {r.tier for r in rows} == {Tier.PORTABLE}
    assert max(r.rank for r in rows) < 50
    assert all(req.name == "triton" for r in rows for req in r.requires)


def test_reading_the_rows_imports_neither_torch_nor_triton():
    code = """
import sys
from attn_core.backends import triton
from attn_core.spec import Device
found = [r for a in ("sm_75", "sm_121") for r in triton.backends(Device(platform="cuda", arch=a))]
sys.exit(0 if found and not {"torch", "triton"} & set(sys.modules) else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
