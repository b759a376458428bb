"""Every vendor's adapters are tested with seeded mistakes. Lists of them must not shrink unseen."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from together import ALONE, devices

from simulators.harness import Mutation

TESTS = Path(__file__).parents[1]
LEAST = {"ascend": 95, "cuda": 200, "intel": 24, "musa": 28, "rocm": 48}
"""Raise a number when mistakes are added; lower it only together with the adapter they belong to."""
LEAST_OF_A_VENDOR, LEAST_OF_ALL = 8, 40


def binding() -> list[str]:
    """Vendors with a kernel that is bound: some row of theirs names a bind function."""
    found = {
        name
        for name, d in devices()
        for r in ALONE[name].catalog(d).devices[str(d)].backends
        if r.plugin == name and r.bind
    }
    return sorted(found)


def mutants(vendor: str) -> set[Mutation]:
    """The mutations that a vendor's test modules hold, each once however many lists it is in."""
    found: set[Mutation] = set()
    for path in sorted((TESTS / f"plugins_{vendor}").glob("test_*.py")):
        if re.search(r"\bmutations?\b", path.read_text(encoding="utf-8"), re.IGNORECASE):
            for value in vars(importlib.import_module(path.stem)).values():
                found |= set(within(value))
    return found


def within(value: object) -> Iterator[Mutation]:
    """The mutations in a list, in lists of pairs, in parameters of pytest."""
    if isinstance(value, Mutation):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from within(part)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Test modules import what lies beside them, as under pytest."""
    for vendor in ALONE:
        monkeypatch.syspath_prepend(TESTS / f"plugins_{vendor}")


@pytest.mark.parametrize("vendor", binding())
def test_each_vendor_that_binds_has_mutations_of_its_own_adapters(vendor):
    found = {m for m in mutants(vendor) if m.module.startswith(f"attn_plugin_{vendor}.")}
    assert len(found) >= max(LEAST[vendor], LEAST_OF_A_VENDOR)


def test_all_vendors_together():
    assert sum(len(mutants(vendor)) for vendor in binding()) >= LEAST_OF_ALL
