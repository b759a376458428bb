"""Prints ``docs/reference.md`` from declarations: the vocabulary, the hooks, the command line, and the source.

    make docs                          # or: python docs/print_reference.py

Nothing is written here that a declaration says; only the environment variables' meanings are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import click
from api_source import Definition, code, entry, find, public_names, source, table

from attn_core import cli, hookspecs, platform
from attn_core.integrations import vllm
from attn_core.plugins import load, probe
from attn_core.plugins.guard import HOOKS
from attn_core.resolve.refuse import _CURABLE as CURABLE
from attn_core.spec import ACCOMPANYING, FIELDS, ROLES, AttentionSpec, Tier
from attn_core.spec.decision import _TEXT as REJECTIONS
from attn_core.spec.fields import RELEVANT

PAGE = Path(__file__).with_name("reference.md")

ENVIRONMENT = {
    platform.ENV_PLATFORM: "Platform that `get_platform()` returns. Unset: the most specific one with a device here.",
    load.ALLOW: "Plugins to load, comma-separated; no other is imported, and each one named must work. Unset: all.",
    load.DENY: "Plugins to leave out, comma-separated; they are not imported. Goes before the list above.",
    load.STRICT: "`1`: a plugin that failed or is incompatible is an error. `0` or unset: it is left out and reported.",
    probe.TIMEOUT: f"Seconds the probe process may take. Unset: {probe.DEFAULT_TIMEOUT:g}.",
    vllm.ENV: "`1`: vLLM's CPU platform is replaced by one whose attention is decided here, see [vllm.md](vllm.md).",
    probe.IN_PROBE: "Set by attn-core in the probe process, where asking for devices is refused. Not for users.",
}

MODULES = (
    "attn_core",
    "attn_core.spec",
    "attn_core.runtime",
    "attn_core.testing.reference",
    "attn_core.testing.compare",
    "attn_core.integrations.transformers",
)
"""Whose public names are printed, each under the first that has it."""

PRINTED = tuple(find("attn_core.spec", name) for name in ("FIELDS", "ROLES", "ACCOMPANYING"))
"""Names that are whole sections of the page."""


def fields() -> list[str]:
    rows = []
    for f in FIELDS.values():
        default = "must be stated" if f.default is None else str(f.default)
        known = f"; one of {', '.join(f.choices)}" if f.choices else ""
        mark = "; settled by the resolver" if f.settled else "; may be unknown" if f.unknown_passes else ""
        rows.append((code(f.name), f.scope, f.type.__name__, default, f.unit, f.doc + known + mark))
    head = ("name", "scope", "type", "default: what a silent backend accepts", "unit", "meaning")
    return ["## Fields", "", source("attn_core.spec.fields").doc, "", *table(head, rows)]


def roles() -> list[str]:
    specs = [AttentionSpec(num_heads=1, head_dim=1, dtype="float32", attn_type=t) for t in FIELDS["attn_type"].choices]
    rows = []
    for role in ROLES:
        asked = ", ".join(s.attn_type for s in specs if role in s.roles)
        who = asked or ("linear groups" if role.startswith("linear") else "the model")
        yes, no = ([code(n) for n in FIELDS if (n in RELEVANT[role]) is judged] for judged in (True, False))
        what = f"only {', '.join(yes)}" if len(yes) < len(no) else f"all but {', '.join(no)}" if no else "all"
        rows.append((code(role), who, "accompanying" if role in ACCOMPANYING else "required", what))
    return [
        *["## Roles", "", "Accompanying: " + find("attn_core.spec.backend", "ACCOMPANYING").doc, ""],
        *table(("role", "asked by", "", "judged on"), rows),
        *["## Tiers", "", find("attn_core.spec", "Tier").doc, ""],
        *[" < ".join(code(t.name) for t in sorted(Tier)), ""],
    ]


def hooks() -> list[str]:
    module = "attn_core.hookspecs"
    out = ["## Hooks", "", source(module).doc.replace("`GROUP`", code(hookspecs.GROUP)), ""]
    return out + [line for name in HOOKS for line in entry(find(module, name), {})]


def command_line() -> list[str]:
    out = ["## Command line", "", cli.cli.help or "", ""]
    for name, command in sorted(cli.cli.commands.items()):
        words = [p.name.upper() for p in command.params if isinstance(p, click.Argument) and p.name]
        options = [(code(_option(p)), _meaning(p)) for p in command.params if isinstance(p, click.Option)]
        about = inspect.cleandoc(command.help or "").replace("``", "`")
        out += [f"### attn-core {name}", "", code(" ".join(["attn-core", name, *words, "[OPTIONS]"])), "", about, ""]
        out += table(("option", "meaning"), options)
    return out


def _option(p: click.Option) -> str:
    return ", ".join(p.opts) + ("" if p.is_flag else f" {p.metavar or p.type.name.upper()}")


def _meaning(p: click.Option) -> str:
    text = p.help or {"--json": "print one JSON object"}[p.opts[0]]
    return text + (" (required)" if p.required else "")


def surroundings() -> list[str]:
    texts = [(code(c), code(text), "yes" if c in CURABLE else "") for c, text in REJECTIONS.items()]
    told = re.search(r"^Exit status: (.*?)\.$", cli.__doc__ or "", re.DOTALL | re.MULTILINE)
    if told is None:
        raise ValueError("the docstring of attn_core.cli does not list the exit status")
    status = [part.split(" ", 1) for part in re.split(r", (?=\d)", " ".join(told[1].split()).replace("``", "`"))]
    return [
        *["## Environment variables", "", *table(("name", "meaning"), [(code(k), v) for k, v in ENVIRONMENT.items()])],
        *["## Rejection codes", "", "`Rejection.text` is printed from the rejection's other fields:", ""],
        *table(("code", "text", "the user can take it away"), texts),
        *["## Exit status", "", *table(("status", "meaning"), status)],
    ]


def names() -> list[str]:
    known = {f.name: f.doc for f in FIELDS.values() if f.is_feature or f.settled or f.scope == "engine"}
    out, seen = list[str](), set[Definition]()
    for module in MODULES:
        fresh = [d for d in (find(module, name) for name in public_names(module)) if d not in seen and d not in PRINTED]
        out += [
            f"## Names of `{module}`",
            "",
            source(module).doc,
            "",
            *(line for d in fresh for line in entry(d, known)),
        ]
        seen |= set(fresh)
    return out


PARTS: tuple[Callable[[], list[str]], ...] = (fields, roles, hooks, command_line, surroundings, names)


def render() -> str:
    """The whole page."""
    head = ["# Reference", "", "Printed from declarations in the source by `make docs`. Do not edit.", ""]
    text = "\n".join([*head, *(line for part in PARTS for line in part())])
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
