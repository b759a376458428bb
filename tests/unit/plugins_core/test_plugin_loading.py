"""Which plugins are found, chosen and kept; what their platforms and catalogs hold. Real distributions, no probe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attn_core.errors import BadInputError, PluginError
from attn_core.hookspecs import hookimpl
from attn_core.plugins import discover, load_plugins
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec, PluginReport
from dists import distribution, plugin

ACME = Device(platform="acme", arch="a1", total_memory=8)
GOOD = """
@hookimpl
def attn_backends(device):
    if device.platform == "acme":
        yield row(device, "fast", "decode")
"""


def status(reports: tuple[PluginReport, ...]) -> dict[str, str]:
    return {r.name: r.status for r in reports}


def report(reports: tuple[PluginReport, ...], name: str) -> PluginReport:
    return next(r for r in reports if r.name == name)


def load(environ: dict[str, str] | None = None, **kwargs: Any) -> Any:
    return load_plugins(environ=environ or {}, **kwargs)


def module(name: str, **functions: Any) -> tuple[str, ModuleType]:
    out = ModuleType(name)
    for hook, f in functions.items():
        setattr(out, hook, hookimpl(f))
    return name, out


def row(device: Device, backend: str = "fast", **changes: Any) -> BackendSpec:
    plain = {"backend": backend, "role": "decode", "platform": device.platform}
    return BackendSpec(**{**plain, "accepts": {"dtype": "bfloat16", "head_dim": 64}, **changes})


# ---- discovery -------------------------------------------------------------------------------------------------------


def test_discovery_reads_every_contract_version_and_imports_nothing(site: Path) -> None:
    plugin(site, "one", "raise RuntimeError('imported')")
    plugin(site, "two", "raise RuntimeError('imported')", group="attn_core.v2", version="3.1")
    plugin(site, "other", "raise RuntimeError('imported')", group="attn_corentin.v1")
    ours = [f for f in discover() if f.dist.startswith("acme-")]
    assert [(f.name, f.dist, f.version, f.api, f.compatible) for f in ours] == [
        ("one", "acme-one", "1.0", "1", True),
        ("two", "acme-two", "3.1", "2", False),
    ]


def test_a_distribution_found_twice_counts_once(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(site, "one", GOOD, version="1.0")
    older = tmp_path / "older"
    plugin(older, "one", GOOD, version="0.9")
    monkeypatch.syspath_prepend(older)
    monkeypatch.syspath_prepend(site)
    assert [f.version for f in discover() if f.name == "one"] == ["1.0"]


def test_broken_metadata_is_no_reason_to_fail(site: Path) -> None:
    plugin(site, "one", GOOD)
    broken = site / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "entry_points.txt").write_bytes(b"[attn_core.v1]\nx = \xff\xfe")
    (site / "acme_one-1.0.dist-info" / "METADATA").write_text("lost")
    assert [(f.dist, f.version) for f in discover() if f.name == "one"] == [("unnamed", "")]
    assert status(load().reports)["one"] == "ok"


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_deny_and_allow_act_before_import(site: Path) -> None:
    plugin(site, "good", GOOD)
    plugin(site, "bomb", "raise RuntimeError('imported')")
    assert status(load({"ATTN_CORE_DISABLE_PLUGINS": " bomb, absent "}).reports)["bomb"] == "blocked"
    allowed = load({"ATTN_CORE_PLUGINS": "good"}).reports
    assert status(allowed)["bomb"] == "blocked"
    assert status(allowed)["good"] == "ok"
    assert status(allowed)["core"] != "blocked"
    assert report(allowed, "bomb").hint == "not named in ATTN_CORE_PLUGINS"
    assert status(load({"ATTN_CORE_PLUGINS": ""}).reports)["bomb"] == "failed"
    assert status(load(allow=["good", "bomb"], deny=["bomb"]).reports)["bomb"] == "blocked"


def test_an_allow_list_may_name_only_what_is_installed(site: Path) -> None:
    plugin(site, "good", GOOD)
    with pytest.raises(
        BadInputError, match=r"names plugin 'goood', which is not installed; did you mean 'good'\?.*core"
    ):
        load({"ATTN_CORE_PLUGINS": "goood"})


def test_a_plugin_the_user_named_must_work(site: Path) -> None:
    plugin(site, "bomb", "raise RuntimeError('boom')")
    with pytest.raises(PluginError, match=r"the user named it.*\nplugin bomb.*import: RuntimeError: boom"):
        load({"ATTN_CORE_PLUGINS": "bomb"})
    assert status(load({"ATTN_CORE_PLUGINS": "bomb"}, strict=False).reports)["bomb"] == "failed"


def test_core_cannot_be_denied_or_claimed(site: Path) -> None:
    with pytest.raises(BadInputError, match="attn-core itself"):
        load({"ATTN_CORE_DISABLE_PLUGINS": "core"})
    distribution(site, "acme-core", {"core": "acme_core"}, modules={"acme_core": "raise RuntimeError('imported')"})
    plugins = load()
    impostor, core = (r for r in plugins.reports if r.name == "core")
    assert (impostor.dist, impostor.status, core.dist, core.status) == ("acme-core", "failed", "attn-core", "ok")
    assert "attn-core's own" in (impostor.error or "")
    here = plugins.probe()[-1]
    assert {b.plugin for b in plugins.catalog(here).devices[str(here)].backends} >= {"core"}


def test_two_distributions_cannot_claim_one_name(site: Path) -> None:
    for dist in ("acme-a", "acme-b"):
        distribution(site, dist, {"twin": "acme_twin"}, modules={"acme_twin": "raise RuntimeError('imported')"})
    twins = [r for r in load().reports if r.name == "twin"]
    assert [(r.dist, r.status) for r in twins] == [("acme-a", "failed"), ("acme-b", "failed")]
    for r in twins:
        assert r.error == "acme-a 1.0 and acme-b 1.0 both claim the plugin name 'twin'; neither is loaded"
        assert r.hint == "uninstall all but one of acme-a, acme-b"
    assert status(load(deny=["twin"]).reports)["twin"] == "blocked"


def test_another_contract_is_listed_and_not_imported(site: Path) -> None:
    plugin(site, "next", "raise RuntimeError('imported')", group="attn_core.v2")
    plugin(site, "past", "raise RuntimeError('imported')", group="attn_core.v0")
    reports = load().reports
    assert report(reports, "next").status == report(reports, "past").status == "incompatible"
    assert report(reports, "next").hint == "upgrade attn-core"
    assert report(reports, "past").hint == "upgrade acme-past"
    assert "attn_core.v2" in (report(reports, "next").error or "")


def test_a_distribution_may_serve_several_contracts(site: Path) -> None:
    plugin(site, "both", GOOD)
    entries = site / "acme_both-1.0.dist-info" / "entry_points.txt"
    entries.write_text(entries.read_text() + "[attn_core.v2]\nboth = acme_both_v2\n")
    assert [r.status for r in load({"ATTN_CORE_STRICT": "0"}).reports if r.name == "both"] == ["ok"]


@pytest.mark.parametrize("source", ["raise RuntimeError('boom')", "import sys; sys.exit(1)", "def ("])
def test_strict_makes_any_failure_an_error(site: Path, source: str) -> None:
    plugin(site, "bomb", source)
    assert status(load().reports)["bomb"] == "failed"
    for kwargs in ({"environ": {"ATTN_CORE_STRICT": "1"}}, {"strict": True}):
        with pytest.raises(PluginError, match="plugin bomb"):
            load(**kwargs)
    with pytest.raises(BadInputError, match="neither 1 nor 0"):
        load({"ATTN_CORE_STRICT": "perhaps"})


def test_an_interrupt_during_import_is_the_users(site: Path) -> None:
    plugin(site, "bomb", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load()


# ---- platforms -------------------------------------------------------------------------------------------------------


def platform(plugin_name: str, *names: str) -> tuple[str, ModuleType]:
    return module(plugin_name, attn_platforms=lambda: [PlatformSpec(name=n, torch_device="x") for n in names])


def test_a_platform_has_one_owner_whatever_the_order() -> None:
    """Two conflicts at once: each is judged on all claims, so a loser of one still counts in the other."""
    claims = [platform("acme", "acme"), platform("copy", "acme", "shared"), platform("third", "shared")]
    outcomes = set()
    for order in permutations(claims):
        plugins = load(extra=order, discovery=False)
        assert set(plugins.platforms()) - {"cpu"} == {"acme"}
        outcomes.add(tuple((r.name, r.status, r.error, r.hint) for r in plugins.reports if r.name != "core"))
    ((acme, copy, third),) = outcomes
    assert acme[1:3] == ("ok", None)
    assert copy[1:3] == ("failed", "attn_platforms: claims platform 'acme', so does acme; acme keeps it")
    assert third[1:3] == ("failed", "attn_platforms: claims platform 'shared', so does copy")


def test_a_platform_may_not_be_declared_twice_by_one_plugin() -> None:
    plugins = load(extra=[platform("acme", "acme", "acme")], discovery=False)
    assert report(plugins.reports, "acme").error == "attn_platforms: claims platform 'acme', twice; acme keeps it"
    assert "acme" not in plugins.platforms()


# ---- catalog ---------------------------------------------------------------------------------------------------------


def test_rows_and_rules_are_stamped_once_and_sorted_by_content() -> None:
    rule = Constraint(name="page", when={"decode": "fast"}, then={"page_size": 64}, because="measured", plugin="liar")
    rows = [row(ACME, "slow"), row(ACME, "fast", plugin="liar"), row(ACME, "fast")]
    plain = module("acme", attn_backends=lambda device: rows, attn_constraints=lambda: [rule, rule])
    catalog = load(extra=[plain], discovery=False).catalog([ACME])
    own = [b for b in catalog.devices["acme:a1"].backends if b.plugin != "core"]
    assert [(b.backend, b.plugin) for b in own] == [("fast", "acme"), ("slow", "acme")]
    assert [c.plugin for c in catalog.devices["acme:a1"].constraints] == ["acme"]
    assert report(catalog.reports, "acme").status == "ok"


def test_rows_for_another_platform_are_an_invalid_declaration() -> None:
    careless = module("careless", attn_backends=lambda: [row(ACME)])
    catalog = load(extra=[careless], discovery=False).catalog(Device(platform="cpu", arch="avx2"))
    failed = report(catalog.reports, "careless")
    assert failed.status == "failed"
    assert "attn_backends item 0: DeclarationError: BackendSpec('fast', 'decode') is for platform 'acme'" in (
        failed.error or ""
    )


def test_a_failure_for_one_device_is_contained_in_that_call() -> None:
    def picky(device: Device) -> Iterator[BackendSpec]:
        if device.arch == "a2":
            raise KeyError("a2")
        yield row(device)

    a2 = Device(platform="acme", arch="a2")
    plugins = load(extra=[module("picky", attn_backends=picky)], discovery=False)
    fine = plugins.catalog(ACME)
    assert report(fine.reports, "picky").status == "ok"
    both = plugins.catalog([ACME, a2])
    assert all(b.plugin == "core" for d in both.devices.values() for b in d.backends)
    assert set(both.devices) == {"acme:a1", "acme:a2"}
    assert report(both.reports, "picky").status == report(plugins.reports, "picky").status == "failed"
    assert plugins.catalog(ACME) == fine, "an answer must not depend on what was asked before"


@pytest.mark.parametrize("hook", ["attn_backends", "attn_constraints"])
def test_one_failing_hook_takes_the_rows_of_the_other_along(hook: str) -> None:
    def broken(device: Device) -> list[Any]:
        raise RuntimeError("lost")

    hooks = {"attn_backends": lambda device: [row(device)], "attn_constraints": lambda device: [], hook: broken}
    plugins = load(extra=[module("acme", **hooks)], discovery=False)
    catalog = plugins.catalog(ACME)
    assert not [b for b in catalog.devices["acme:a1"].backends if b.plugin == "acme"]
    assert report(catalog.reports, "acme").error == f"{hook}: RuntimeError: lost"
    with pytest.raises(PluginError, match="strict mode"):
        load(extra=[module("acme", **hooks)], discovery=False, strict=True).catalog(ACME)


def test_devices_of_one_name_share_what_is_promised_for_each() -> None:
    small = Device(platform="acme", arch="a1", total_memory=4)

    def by_memory(device: Device) -> Iterator[BackendSpec]:
        yield row(device, "fast")
        if device.total_memory == 8:
            yield row(device, "big")

    plugins = load(extra=[module("acme", attn_backends=by_memory)], discovery=False)

    def names(*devices: Device) -> list[str]:
        return [b.backend for b in plugins.catalog(devices).devices["acme:a1"].backends if b.plugin == "acme"]

    assert names(ACME) == ["big", "fast"]
    assert names(ACME, small) == names(small, ACME) == ["fast"]


def test_a_catalog_is_the_same_in_any_load_order_and_made_once() -> None:
    calls: list[str] = []

    def hooks(name: str) -> tuple[str, ModuleType]:
        def attn_backends(device: Device) -> list[BackendSpec]:
            calls.append(name)
            return [row(device, name)]

        return module(name, attn_backends=attn_backends)

    parts = [hooks("x"), hooks("y"), hooks("z")]
    catalogs = [load(extra=order, discovery=False).catalog(ACME) for order in permutations(parts)]
    assert all(c == catalogs[0] for c in catalogs)
    calls.clear()
    plugins = load(extra=parts, discovery=False)
    assert plugins.catalog(ACME) is plugins.catalog([ACME])
    assert calls == ["x", "y", "z"]


def test_a_failure_is_said_aloud_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = module("acme", attn_backends=lambda: 1 / 0)
    plugins = load(extra=[broken], discovery=False)
    for device in (ACME, Device(platform="acme", arch="a2")):
        plugins.catalog(device)
    own = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "acme" in r.getMessage()]
    assert own == ["plugin acme is left out: attn_backends: ZeroDivisionError: division by zero"]
