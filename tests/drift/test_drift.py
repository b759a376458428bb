"""What we rely on in other projects is as recorded, wherever they are installed; and the checker itself can tell."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from seams import DISTRIBUTIONS, SHAPES, imported, places
from shapes import MissingError, Sources, drift

RECORDED = {
    host: json.loads((Path(__file__).parent / "recorded" / f"{host}.json").read_text(encoding="utf-8"))
    for host in DISTRIBUTIONS
}


@pytest.mark.parametrize("host", DISTRIBUTIONS)
def test_the_host_is_as_recorded(host: str) -> None:
    found = places(host)
    if not found:
        assert host != "transformers"
        pytest.skip(f"{host} is nowhere here; make .venv-{host}/.ready, or ATTN_CORE_DRIFT_{host.upper()}=WHEEL")
    for root in found:
        lines = drift(host, RECORDED[host], Sources(root))
        assert not lines, "\n".join([f"{root}:", *lines])


@pytest.mark.parametrize("host", DISTRIBUTIONS)
def test_everything_we_import_is_recorded(host: str) -> None:
    unknown = sorted({*imported(host), *SHAPES[host]} - RECORDED[host]["seams"].keys())
    assert not unknown, f"python tests/drift/record.py {host} SITE_PACKAGES would add {', '.join(unknown)}"


HOST = {
    "host/__init__.py": "from .api import *\n",
    "host/api.py": (
        "from typing import NamedTuple\nfrom host.base import Base\n"
        "class Config(NamedTuple):\n    head_size: int\n    dtype: str = 'auto'\n\n"
        "class Impl(Base):\n    def forward(self, layer, query, *, scale, out=None, **kwargs): ...\n\n"
        "try:\n    import missing\nexcept ImportError:\n    def helper(a, /, b=1, *rest): ...\n"
    ),
    "host/base.py": "class Base:\n    def build(self, fast_build=False): ...\n",
    "host-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: host\nVersion: 1.0\n",
}
WRITTEN = {
    "version": "0.9",
    "distributions": ["host"],
    "seams": {
        "host.api:Config": ["head_size", "dtype="],
        "host.api:Impl.forward": ["self", "layer", "query", "*", "scale", "out=", "**kwargs"],
        "host.api:Impl.build": ["self", "fast_build="],
        "host.api:helper": ["a", "/", "b=", "*rest"],
        "host:Config": None,
        "host:api": None,
    },
}


def host(tmp_path: Path, changes: dict[str, tuple[str, str]] | None = None, *, wheel: bool = False) -> Sources:
    files = dict(HOST)
    for path, (old, new) in (changes or {}).items():
        assert old in files[path]
        files[path] = files[path].replace(old, new)
    if wheel:
        with zipfile.ZipFile(tmp_path / "host-1.0-py3-none-any.whl", "w") as z:
            for path, text in files.items():
                z.writestr(path, text)
        return Sources(tmp_path / "host-1.0-py3-none-any.whl")
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return Sources(tmp_path)


@pytest.mark.parametrize("wheel", [False, True])
def test_unmoved_sources_are_silent_as_a_folder_and_as_a_wheel(tmp_path: Path, wheel: bool) -> None:
    assert drift("host", WRITTEN, host(tmp_path, wheel=wheel)) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "says"),
    [
        ("host/api.py", "layer, query", "module, query", "host.api:Impl.forward: layer is now called module"),
        ("host/api.py", "layer, query", "query", "host.api:Impl.forward: layer is gone"),
        ("host/api.py", "layer, query", "query, layer", "host.api:Impl.forward: the order changed: "),
        ("host/api.py", "scale, out", "scale, sinks, out", "host.api:Impl.forward: sinks is new"),
        ("host/api.py", "out=None", "out", "host.api:Impl.forward: out lost its default"),
        ("host/api.py", "dtype: str = 'auto'", "dtype: str", "host.api:Config: dtype lost its default"),
        ("host/api.py", "    head_size: int\n", "    head_size: int\n    rswa: bool\n", "host.api:Config: rswa is new"),
        ("host/api.py", "def forward", "def attend", "host.api: Impl has no forward"),
        ("host/api.py", "def helper", "def assist", "host.api has no helper"),
        ("host/base.py", "fast_build=False", "fast=False", "host.api:Impl.build: fast_build= is now called fast="),
    ],
)
def test_a_move_is_told_exactly(tmp_path: Path, path: str, old: str, new: str, says: str) -> None:
    (line,) = drift("host", WRITTEN, host(tmp_path, {path: (old, new)}))
    assert line.startswith("host 1.0 (recorded from 0.9): host.api:")
    assert says in line


def test_a_module_that_moved_is_told(tmp_path: Path) -> None:
    sources = host(tmp_path)
    (tmp_path / "host" / "api.py").rename(tmp_path / "host" / "interface.py")
    lines = drift("host", WRITTEN, Sources(sources.root))
    assert len(lines) == len(WRITTEN["seams"])
    assert "host.api:Config: module host.api is gone" in lines[0]
    with pytest.raises(MissingError, match="module nowhere is gone"):
        sources.shape("nowhere:x")
