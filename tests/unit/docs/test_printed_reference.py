"""The reference is what its generator prints today, and nothing public goes without a word."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import attn_core
from attn_core import cli, hookspecs
from attn_core.plugins.guard import HOOKS
from attn_core.spec import FIELDS

ROOT = Path(__file__).parents[3]
SOURCES = [p.read_text(encoding="utf-8") for p in (ROOT / "core" / "src").rglob("*.py")]

sys.path.append(str(ROOT / "docs"))
api_source = importlib.import_module("api_source")
print_reference = importlib.import_module("print_reference")

PAGE = print_reference.PAGE.read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert print_reference.render() == PAGE, "run `make docs`"


@pytest.mark.parametrize("name", attn_core.__all__)
def test_every_public_name_has_a_docstring_and_an_entry(name: str) -> None:
    assert api_source.find("attn_core", name).doc
    assert f"\n### {name}\n" in PAGE


def test_every_field_has_a_meaning_and_a_row() -> None:
    for f in FIELDS.values():
        assert f.doc
        assert re.search(
            rf"^\| `{re.escape(f.name)}` \| {f.scope} \|.*{re.escape(f.doc[:12].split('|')[0])}", PAGE, re.MULTILINE
        )


def test_every_hook_is_documented() -> None:
    assert set(HOOKS) == {n for n in vars(hookspecs) if n.startswith("attn_")} != set()
    for name in HOOKS:
        assert api_source.find("attn_core.hookspecs", name).doc
        assert f"\n### {name}\n" in PAGE


def test_every_command_and_option_has_help() -> None:
    for name, command in cli.cli.commands.items():
        assert command.help
        section = PAGE.partition(f"\n### attn-core {name}\n")[2].partition("\n### ")[0]
        for option in command.params:
            assert option.opts[0] in section or f" {option.name.upper()} " in section


def test_every_environment_variable_is_listed() -> None:
    used = {name for text in SOURCES for name in re.findall(r"\bATTN_CORE_[A-Z_]+\b", text)}
    assert used == set(print_reference.ENVIRONMENT)


def test_every_exit_status_of_the_command_line_is_listed() -> None:
    used = set(re.findall(r"SystemExit\((\d+)\)", Path(cli.__file__).read_text(encoding="utf-8"))) - {"130"}
    listed = re.findall(r"^\| (\d) \|", PAGE.partition("\n## Exit status\n")[2], re.MULTILINE)
    assert {"0", *used} == set(listed)


def test_signatures_are_the_real_ones() -> None:
    def shown(name: str) -> str:
        return "\n".join(api_source.entry(api_source.find("attn_core", name), {}))

    assert "simulate(\n    device: str | Device,\n    *,\n    installed: bool = False,\n" in shown("simulate")
    assert "`of(spec: Group | Mapping[str, Group] | ModelSpec | None = None, /, **spec_fields: Any)" in shown(
        "ModelSpec"
    )
    assert "| `tier` | `Tier` | `Tier.PORTABLE` |" in shown("BackendSpec")
    assert "* `REFERENCE = 0`" in shown("Tier")
