"""The plugin of the tutorial works as the tutorial says: it is written down, installed, run, broken and changed.

Blocks of kind ``file`` are written once; a ``diff`` lasts until the end of its section. A ``run`` block shows lines of
the real output, all of them in order, though not all there are: other plugins may be installed here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docblocks import Block, blocks, commands, patched

from dists import distribution

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "tutorial-plugin.md").read_text(encoding="utf-8")
BLOCKS = blocks(TEXT)
FILES = {b.argument: b.body for b in BLOCKS if b.kind == "file"}
MODULES = [name for name in FILES if name.startswith("src/") and name.endswith(".py")]
SECTIONS = list(dict.fromkeys(b.section for b in BLOCKS if b.kind == "run"))


def run(command: str, folder: Path) -> tuple[int, list[str]]:
    """Exit status and lines of output and errors of a command of the page."""
    words = shlex.split(command)
    settings = dict(w.split("=", 1) for w in words if re.match(r"[A-Z_]+=", w))
    program = {"attn-core": ["-m", "attn_core.cli"], "python": []}[words[len(settings)]]
    path = [str(folder / "src"), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ATTN_CORE_")}
    done = subprocess.run(
        [sys.executable, *program, *words[len(settings) + 1 :]],
        cwd=folder, env={**clean, "PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8", **settings},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


def plain(line: str) -> str:
    """A line without what depends on the neighbours: column widths, digests, and who else could have served."""
    line = re.sub(r"\[[0-9a-f]{16}\]", "[digest]", line)
    line = re.sub(r"; also eligible: .*", "", line)
    return " ".join(line.split()) if line[:1] in "│┃" else line.rstrip()


def missing(shown: list[str], got: list[str]) -> list[str]:
    """Lines shown that the output lacks, or has in another order."""
    rest: Iterator[str] = iter([plain(line) for line in got])
    return [line for line in shown if plain(line) not in rest]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files of the page, importable, with the dist-info that an editable install leaves."""
    for name, body in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
    name, version = (
        re.search(rf'^{key} = "(.*)"$', FILES["pyproject.toml"], re.MULTILINE) for key in ("name", "version")
    )
    entry = re.search(r'^\[project\.entry-points\."(.*)"\]\n(\w+) = "(.*)"$', FILES["pyproject.toml"], re.MULTILINE)
    assert name
    assert version
    assert entry
    distribution(tmp_path / "site", name[1], {entry[2]: entry[3]}, group=entry[1], version=version[1])
    return tmp_path


def test_every_block_is_used() -> None:
    assert {b.kind for b in BLOCKS} == {"file", "diff", "run", "install"}
    assert len([line for line in TEXT.splitlines() if line.startswith("```")]) == 2 * len(BLOCKS)


def test_the_plugin_has_at_most_40_lines() -> None:
    total = sum(len(FILES[name].splitlines()) for name in MODULES)
    assert total <= 40
    assert f"The two modules have {total} lines" in TEXT


def test_torch_is_imported_where_bind_is_and_nowhere_else() -> None:
    assert [name for name in MODULES if "import torch" in FILES[name]] == ["src/acme_attention/kernels.py"]
    assert "def bind(" in FILES["src/acme_attention/kernels.py"]
    assert 'bind="acme_attention.kernels:bind"' in FILES["src/acme_attention/__init__.py"]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_tells_what_happens(section: str, project: Path) -> None:
    steps: list[Block] = [b for b in BLOCKS if b.section == section and b.kind in ("diff", "run")]
    for b in steps:
        if b.kind == "diff":
            path = project / b.argument
            path.write_text(patched(path.read_text(encoding="utf-8"), b.body), encoding="utf-8")
            continue
        for command, shown in commands(b.body):
            status, got = run(command, project)
            told = "\n".join(got)
            assert f"exit {status}" == (b.argument or "exit 0"), told
            assert shown
            assert not missing(shown, got), told


def test_the_command_that_installs_it(project: Path) -> None:
    for needed in ("pip", "hatchling", "editables"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    ((command, _),) = commands(next(b.body for b in BLOCKS if b.kind == "install"))
    target = project / "target"
    extra = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([sys.executable, "-m", *shlex.split(command), *extra], cwd=project, check=True, timeout=120)
    listing = (
        f"import site; site.addsitedir({str(target)!r}); from attn_core.cli import main; main(['plugins', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", listing], cwd=target, capture_output=True, encoding="utf-8", check=True, timeout=120
    )
    found = [p for p in json.loads(done.stdout)["plugins"] if p["name"] == "acme"]
    assert [(p["dist"], p["version"], p["status"]) for p in found] == [("acme-attention", "0.1.0", "ok")]
