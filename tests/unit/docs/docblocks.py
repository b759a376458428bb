"""The fenced blocks of a document, each under an HTML comment that says what a test does with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(
    r"(?:^<!-- (?P<says>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    section: str
    """Heading above the block."""
    kind: str
    """What the comment says before its colon: ``file``, ``diff``, ``run``, ...; empty without a comment."""
    argument: str
    language: str
    body: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a document, in order."""
    headings = [(m.start(), m[1]) for m in _HEADING.finditer(text)]
    out = []
    for m in _BLOCK.finditer(text):
        kind, _, argument = (part.strip() for part in (m["says"] or "").partition(":"))
        section = next((name for at, name in reversed(headings) if at < m.start()), "")
        out.append(Block(section, kind, argument, m["language"], m["body"]))
    return out


def patched(source: str, diff: str) -> str:
    """``source`` with a diff applied; hunks are separated by ``@@`` and must match one place each."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = [(line[0], line[1:]) for line in hunk.splitlines(keepends=True)]
        old, new = ("".join(text for mark, text in lines if mark in keep) for keep in (" -", " +"))
        if source.count(old) != 1:
            raise ValueError(f"hunk matches {source.count(old)} places, not one:\n{hunk}")
        source = source.replace(old, new)
    return source


def commands(console: str) -> list[tuple[str, list[str]]]:
    """(command, lines of its output) of a console block, where a command is what follows ``$``."""
    out: list[tuple[str, list[str]]] = []
    for line in console.splitlines():
        if line.startswith("$ "):
            out.append((line[2:], []))
        else:
            out[-1][1].append(line)
    return out
