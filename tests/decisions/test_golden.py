"""Decisions change only on purpose."""

from __future__ import annotations

import difflib

from golden import TABLE, lines


def test_decisions_are_the_reviewed_ones():
    expected = TABLE.read_text(encoding="utf-8").splitlines()
    diff = list(difflib.unified_diff(expected, list(lines()), "reviewed", "now", lineterm="", n=0))
    assert not diff, "\n".join([*diff, "if this is meant: python tests/decisions/golden.py, and review the diff"])
