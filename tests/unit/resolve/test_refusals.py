"""When nothing fits, or only a reference would: every reason, what each pin costs, short enough to read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_decisions import FULL, PORTABLE, SLIDING
from world import CPU, CUDA, both, catalog, decide, row

from attn_core import AttentionSpec, Constraint, NoBackendError, OneOf
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.spec import PluginReport

SINKS = AttentionSpec(num_heads=64, num_kv_heads=8, head_dim=64, dtype="bfloat16", sinks=True)


def refuse(*args, **kwargs) -> NoBackendError:
    with pytest.raises(NoBackendError) as e:
        decide(*args, **kwargs)
    return e.value


def test_an_explicit_backend_without_sinks_is_refused_with_the_alternatives():
    e = refuse(SINKS, catalog([*both("flashinfer", tier="BEST"), *PORTABLE]), backend="flashinfer")
    assert e.code == "no_backend"
    assert "does not support sinks=true" in e.text
    assert "without backend=flashinfer: triton / triton, page 16" in e.text
    assert any(
        r.code == "feature" and r.field == "sinks" and r.got is True and r.allowed == (False,) for r in e.rejections
    )


def test_each_single_pin_has_its_price():
    rows = both("fa3", tier="BEST", accepts={"page_size": OneOf(64), "kv_layout": OneOf("HND")})
    e = refuse(FULL, catalog(rows), backend="fa3", page_size=1, kv_layout="NHD")
    assert e.relaxations == ()  # two pins stand in the way: taking back one does not help
    e = refuse(FULL, catalog(rows), backend="fa3", page_size=1)
    assert e.relaxations == ("without page_size=1: fa3 / fa3, page 64",)  # without backend=fa3: only a reference


def test_conflicts_name_the_value():
    rows = [row("p", "prefill", tier="BEST", accepts={"page_size": OneOf(64)}),
            row("d", "decode", tier="BEST", accepts={"page_size": OneOf(16)})]  # fmt: skip
    e = refuse(FULL, catalog(rows), prefill_backend="p", decode_backend="d")
    assert {(r.field, r.got, r.allowed) for r in e.rejections if r.code == "conflict" and r.backend in "pd"} == {
        ("page_size", "it needs 64", "decode allows 16"),
        ("page_size", "it needs 16", "prefill allows 64"),
    }


def test_groups_that_cannot_share():
    rows = [*both("a", tier="BEST", accepts={"page_size": OneOf(64)}),
            *both("b", tier="BEST", accepts={"page_size": OneOf(16), "sliding_window": True})]  # fmt: skip
    e = refuse({"full": FULL, "sliding": SLIDING}, catalog(rows), backend={"full": "a", "sliding": "b"})
    assert "cannot share the values" in e.text
    assert {(r.got, r.allowed) for r in e.rejections if r.code == "conflict" and r.field == "page_size"} == {
        ("it needs 64", "sliding allows 16"),
        ("it needs 16", "full allows 64"),
    }


def test_a_constraint_that_forbids_every_combination_is_named():
    rule = Constraint(
        name="apart", when={"prefill": "k"}, then={"decode": "other"}, because="k is no pair", plugin="cuda"
    )
    rows = both("k", tier="BEST")
    e = refuse(FULL, catalog(rows, (rule,)), backend="k")
    assert "k is no pair" in e.text


REASONS: tuple[dict[str, Any], ...] = (
    {"accepts": {"head_dim": OneOf(128)}},
    {"accepts": {"dtype": OneOf("float16")}},
    {"needs": {"tcgen05"}},
    {"requires": ("vendor-kernels>=2",)},
    {"accepts": {"page_size": OneOf(256), "group_size": OneOf(1)}},
    {"accepts": {"kv_layout": OneOf("PRIVATE")}},
    {"needs": {"mfma"}, "requires": ("aiter",)},
    {"accepts": {"num_heads": OneOf(128), "graph": OneOf("none")}},
)
PINS = {"page_size": 16, "kv_layout": "NHD", "graph": "full", "deterministic": True, "tensor_parallel": 2}


def test_a_large_infeasible_catalogue_is_refused_briefly():
    """4 roles x 8 rows, none of which fits, several pins: every row has a reason, and the text fits a screen or two.
    How fast is measured in benchmarks/."""
    rows = [
        row(f"kernel{i}", role, tier="BEST", **{**r, "accepts": {"sliding_window": True, **r.get("accepts", {})}})
        for role in ("prefill", "decode", "kv_write", "encode")
        for i, r in enumerate(REASONS)
    ]
    vision = AttentionSpec(num_heads=16, head_dim=72, dtype="bfloat16", attn_type="encoder_only")
    cat = Catalog({"cuda:sm_90": DeviceCatalog(tuple(rows))})
    e = refuse({"full": SINKS, "vision": vision}, cat, installed=Installed(), **PINS)
    assert len(e.text.splitlines()) < 60
    assert len({(r.backend, r.role) for r in e.rejections}) == 32


# reference_only ----------------------------------------------------------------------------------------------------


def test_a_missing_package_must_not_end_in_a_reference_backend():
    rows = both("fa3", tier="BEST", requires=("flash-attn-3>=3",))
    e = refuse(FULL, catalog(rows), installed=Installed())
    assert e.code == "reference_only"
    assert "fa3 (flash-attn-3>=3 is not installed)" in e.text
    assert "allow_reference" in e.text
    d = decide(FULL, catalog(rows), installed=Installed(), allow_reference=True)
    assert d.backend("decode") == "torch_native"
    d = decide(FULL, catalog(rows), installed=Installed(), backend="torch_native")
    assert d.backend("decode") == "torch_native"


def test_a_pin_must_not_end_in_a_reference_backend():
    rows = both("fa3", tier="BEST", accepts={"page_size": OneOf(64)})
    e = refuse(FULL, catalog(rows), page_size=1)
    assert e.code == "reference_only"
    assert "without page_size=1: fa3 / fa3, page 64" in e.text


def test_a_failed_plugin_must_not_end_in_a_reference_backend():
    report = PluginReport(name="cuda", status="failed", error="ImportError: libcudart")
    e = refuse(FULL, catalog([], reports=(report,)))
    assert e.code == "reference_only"
    assert "plugin cuda failed (ImportError: libcudart)" in e.text


def test_a_reference_is_fine_where_nothing_better_could_be_had():
    assert decide(SINKS, catalog(both("fa3", tier="BEST"))).backend("decode") == "torch_native"


def test_a_reference_is_fine_on_the_cpu_and_for_accompanying_roles():
    rows = both("amx", CPU, tier="BEST", requires=("sgl-kernel",))
    d = decide(FULL, catalog(rows, device=CPU), CPU, installed=Installed())
    assert d.backend("decode") == "torch_native"
    writer = row("fused", "kv_write", tier="BEST", requires=("flashinfer-python",))
    d = decide(FULL, catalog([*PORTABLE, writer]), installed=Installed())
    assert d.backend("kv_write") == "torch_native"


def test_kernels_missing_at_bind_are_rejections():
    installed = Installed(assume=True, unusable={"one:bind": "undefined symbol"})
    first = [replace(r, bind="one:bind") for r in both("fa3", tier="BEST")]
    d = decide(FULL, catalog([*first, *PORTABLE]), installed=installed)
    assert d.backend("decode") == "triton"
    assert "its kernel could not be bound: undefined symbol" in d.explain()
    second = [replace(r, bind="another:bind") for r in both("fa3", tier="BEST", rank=1)]
    d = decide(FULL, catalog([*first, *second, *PORTABLE]), installed=installed)
    assert {c.bind for r, c in d.groups["full"].choices.items() if r != "kv_write"} == {"another:bind"}


def test_impostors_are_told_from_the_vendors_package():
    rows = [*both("aiter", tier="BEST", requires=("aiter>=0.1",)), *PORTABLE]
    installed = Installed({"aiter": "0.13"}, impostors={"aiter": "aiter 0.13 lacks aiter.ops.mha"})
    d = decide(FULL, catalog(rows), CUDA, installed=installed)
    (r,) = [r for r in d.rejections if r.role == "decode" and r.backend == "aiter"]
    assert r.code == "package"
    assert r.hint.startswith("aiter 0.13 lacks aiter.ops.mha")
