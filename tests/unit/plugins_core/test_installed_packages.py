"""What counts as installed: metadata, proof by files, strangers of the same name, toolkits. Nothing gets imported."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.plugins import installed_packages
from attn_core.spec import BackendSpec, Device, Requirement
from dists import distribution

BOMB = "raise RuntimeError('imported')"


def installed(*requirements: Requirement | str, devices: tuple[Device, ...] = ()) -> Installed:
    rows = tuple(
        BackendSpec(
            backend=f"b{i}",
            role="decode",
            platform="acme",
            accepts={"dtype": "bfloat16", "head_dim": 64},
            requires=(r,),
        )
        for i, r in enumerate(requirements)
    )
    return installed_packages(Catalog(devices={"acme:a": DeviceCatalog(rows)}), devices)


def needs(spec: str, *symbols: str) -> Requirement:
    return Requirement(spec, symbols=symbols)


def test_versions_come_from_metadata_under_canonical_names(site: Path) -> None:
    distribution(site, "Acme.Flash-Attn", version="2.8.1+cu13")
    found = installed("acme_flash.attn>=2", needs("acme-absent>=1"))
    assert found.versions == {"acme-flash-attn": "2.8.1+cu13"}
    assert found.impostors == {}
    assert not found.assume


def test_symbols_are_found_without_importing_their_parents(site: Path) -> None:
    modules = {"acme_pkg.__init__": BOMB, "acme_pkg.sub.__init__": BOMB, "acme_pkg.sub.leaf": BOMB}
    distribution(site, "acme-pkg", modules=modules)
    found = installed(needs("acme-pkg", "acme_pkg.sub.leaf", "acme_pkg"))
    assert found.versions == {"acme-pkg": "1.0"}
    assert found.impostors == {}
    assert not [m for m in sys.modules if m.startswith("acme_pkg")]


@pytest.mark.parametrize("symbol", ["acme_pkg.sub", "acme_pkg.sub.leaf", "acme_other", "acme_pkg.one.deeper"])
def test_a_stranger_of_the_same_name_is_an_impostor(site: Path, symbol: str) -> None:
    distribution(site, "acme-pkg", modules={"acme_pkg.__init__": BOMB, "acme_pkg.one": BOMB})
    found = installed(needs("acme-pkg", "acme_pkg", symbol))
    assert list(found.impostors) == ["acme-pkg"]
    assert symbol in found.impostors["acme-pkg"]
    assert found.version(Requirement("acme-pkg"), {}) is None


def test_one_proven_requirement_proves_the_package(site: Path) -> None:
    distribution(site, "acme-pkg", modules={"acme_pkg.__init__": BOMB, "acme_pkg.one": BOMB})
    assert installed(needs("acme-pkg", "acme_pkg.new"), needs("acme-pkg", "acme_pkg.one")).impostors == {}


def test_a_package_built_from_source_is_present_at_an_unknown_version(site: Path) -> None:
    (site / "acme_built.py").write_text(BOMB)
    assert installed(needs("acme-built>=3", "acme_built")).versions == {"acme-built": ""}


def test_a_folder_of_that_name_proves_nothing(site: Path) -> None:
    (site / "acme_folder").mkdir()
    assert installed(needs("acme-folder", "acme_folder")).versions == {}


def test_modules_already_imported_are_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "acme_live.kernels", ModuleType("acme_live.kernels"))
    assert installed(needs("acme-live", "acme_live.kernels")).versions == {"acme-live": ""}


def test_unreadable_versions_are_unknown_not_an_error(site: Path) -> None:
    distribution(site, "acme-odd", version="latest")
    assert installed("acme-odd>=1").versions == {"acme-odd": ""}


def test_toolkits_of_the_device_win_over_packages_of_that_name(site: Path) -> None:
    distribution(site, "acme-toolkit", version="99")
    old, new = (
        Device(platform="acme", arch="a", versions={"acme_toolkit": v, "driver": "r5"}) for v in ("9.1", "10.2")
    )
    need = needs("acme-toolkit>=9", "acme_missing")
    assert installed(need, devices=(new,)).versions == {"acme-toolkit": "10.2", "driver": ""}
    assert installed(need, devices=(new, old)).versions == installed(need, devices=(old, new)).versions
    assert installed(need, devices=(new, old)).versions["acme-toolkit"] == "9.1"
    assert installed(need, devices=(new,)).impostors == {}


def test_a_build_without_one_kernel_does_not_count_for_it(site: Path) -> None:
    """vLLM has a file per FlashAttention, and not every build has all: a row needs its own, not just the package."""
    distribution(site, "acme-pkg", modules={"acme_pkg.__init__": BOMB, "acme_pkg.one": BOMB})
    without, with_ = needs("acme-pkg", "acme_pkg.two"), needs("acme-pkg", "acme_pkg.one")
    found = installed(without, with_)
    assert found.version(with_, {}) == "1.0"
    assert found.version(without, {}) is None
    assert found.objection(without) == "the installed acme-pkg 1.0 was built without acme_pkg.two"
