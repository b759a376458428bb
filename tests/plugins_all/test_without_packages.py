"""Whatever vendor package is missing, there is an answer: another kernel, or a refusal that says what to install."""

from __future__ import annotations

import re

import pytest
from together import ALONE, MODELS, devices

from attn_core import NoBackendError, Requirement, simulate

KNOWN = [pytest.param(name, device, id=f"{name}-{device.arch}") for name, device in devices()]
EVERY_ROLE = [MODELS[m] for m in ("llama-3.1-8b", "deepseek-v3", "gte-small")]
INSTRUCTION = re.compile(r"(^|[;:] )(pip install|install|build|use|upgrade) \S+")


def rejected(name, device, without):
    """(backend, role, package) -> hints, of all packages that rejections name; asking must not raise anything else."""
    platform = simulate(device, plugins=ALONE[name], without=tuple(without))
    found: dict[tuple[str, str, str], set[str]] = {}
    for model in EVERY_ROLE:
        try:
            rejections = platform.resolve(model).rejections
        except NoBackendError as e:
            rejections = e.rejections
        for r in rejections:
            if r.code == "package":
                found.setdefault((r.backend, r.role, r.field), set()).add(r.hint)
    return found


def needing(name, device):
    """(backend, role, package) for every requirement of every row of a plugin on a device."""
    rows = ALONE[name].catalog(device).devices[str(device)].backends
    roles = {role for m in EVERY_ROLE for g in m.groups.values() for role in g.roles} | {"allreduce_fusion"}
    return {
        (row.backend, row.role, r.name)
        for row in rows
        if row.plugin == name and row.role in roles
        for r in row.requires
        if isinstance(r, Requirement)
    }


@pytest.mark.parametrize(("name", "device"), KNOWN)
def test_each_missing_package_is_a_rejection_with_a_way_out(name, device):
    wanted = needing(name, device)
    assert wanted, "every row of a vendor needs something"
    assert not rejected(name, device, ()), "a what-if assumes that every known package is installed"
    for package in sorted({p for _, _, p in wanted}):
        found = rejected(name, device, [package])
        assert {p for _, _, p in found} == {package}
        assert set(found) == {w for w in wanted if w[2] == package}
        for hints in found.values():
            assert all(INSTRUCTION.search(h) for h in hints), hints


@pytest.mark.parametrize(("name", "device"), KNOWN)
def test_all_packages_missing_at_once(name, device):
    wanted = needing(name, device)
    assert set(rejected(name, device, sorted({p for _, _, p in wanted}))) == wanted
