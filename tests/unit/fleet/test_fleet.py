"""Fleets as data: what is named, what is shared, what is asked only once, and what a fleet on paper may say."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attn_core import ANY, BackendSpec, BadInputError, Device, EngineOptions, ModelSpec, NoBackendError, simulate
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.fleet import FleetDecision, FleetError, Ranks, decide, describe, failure, read
from attn_core.platform import installed_plugins
from attn_core.resolve import judge
from attn_core.resolve.joint import Member, resolve_jointly
from attn_core.resolve.refuse_joint import RankRejection

MODELS = Path(__file__).parents[2] / "data" / "models"
GPT_OSS = ModelSpec.from_hf_config(MODELS / "gpt-oss-20b.json")
LLAMA = ModelSpec.from_hf_config(MODELS / "llama-3.1-8b.json")
FIVE = ("cuda:h200", "cuda:sm_80", "cuda:gb10", "rocm:mi300x", "cuda:sm_100")


def said(device: str = "cuda:h200", model: Any = LLAMA, **given: Any) -> dict[str, Any]:
    roles, options = given.pop("roles", None), given.pop("options", {})
    return describe(model, platform=simulate(device, **given), roles=roles, **options)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([1, 0], "ranks 0, 1"),
        (range(8), "ranks 0 to 7"),
        ([3, 17, *range(20, 30)], "ranks 3, 17 and 20 to 29"),
        ([3, 17, *range(20, 30), *range(40, 80, 2)], "ranks 3, 17, 20 to 29 and 20 more"),
    ],
)
def test_ranks_have_short_names(ranks: Any, text: str) -> None:
    found = Ranks.of(ranks)
    assert str(found) == text
    assert sorted(ranks) == list(found)
    assert len(found) == len(list(ranks))
    assert all(r in found for r in ranks)
    assert 10_000 not in found


def test_different_devices_share_what_a_cache_is() -> None:
    fleet = decide([said("cuda:h200", GPT_OSS), said("rocm:mi300x", GPT_OSS), said("cuda:h200", GPT_OSS)], GPT_OSS)
    assert {d.values["page_size"] for d in map(fleet.decision_of, range(3))} == {fleet.values["page_size"]}
    assert fleet.decision_of(0) is fleet.decision_of(2)
    assert str(fleet.kind_of(0).ranks) == "ranks 0 and 2"
    assert "full.decode" in fleet.mixed
    assert "different backends, so equal up to rounding only: full.decode" in fleet.explain()
    assert "also possible" in fleet.explain()
    assert all(isinstance(r, RankRejection) and "; rank" in r.text for r in fleet.rejections)
    assert FleetDecision.from_json(fleet.dumps()).dumps() == fleet.dumps()


def test_renumbering_ranks_changes_no_decision() -> None:
    given = [said(d, GPT_OSS) for d in ("cuda:h200", "rocm:mi300x", "cuda:gb10", "rocm:mi300x")]
    first = decide(given, GPT_OSS)
    for seed in range(5):
        order = list(range(len(given)))
        random.Random(seed).shuffle(order)
        again = decide([given[i] for i in order], GPT_OSS)
        for new, old in enumerate(order):
            assert again.decision_of(new).digest == first.decision_of(old).digest


def test_only_kinds_are_judged_and_ten_thousand_ranks_take_less_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[str, str]] = []
    real = judge.Judge.candidates
    monkeypatch.setattr(
        judge.Judge, "candidates", lambda self, *args: judged.append((str(self.device), self.role)) or real(self, *args)
    )
    texts = [json.dumps(said(d, GPT_OSS)) for d in FIVE]
    ranks = [texts[i % 5] for i in range(10_000)]
    decide(ranks[:5], GPT_OSS)
    few = sorted(judged)
    judged.clear()
    start = time.process_time()
    fleet = decide(ranks, GPT_OSS)
    taken = time.process_time() - start
    assert sorted(judged) == few
    assert (fleet.size, len(fleet.kinds)) == (10_000, 5)
    assert fleet.decision_of(9_999) is fleet.decision_of(4)
    assert taken < 1, f"{taken:.2f} s"
    judged.clear()
    start = time.process_time()
    on_paper = read({"ranks": [{"device": d, "count": 2_000} for d in FIVE]}).resolve(GPT_OSS)
    assert sorted(judged) == few
    assert time.process_time() - start < 1
    assert on_paper.size == 10_000


def test_prefill_and_decode_on_different_vendors() -> None:
    entries = [
        {"device": "cuda:h200", "count": 8, "roles": ["prefill"]},
        {"device": "rocm:mi300x", "count": 8, "roles": ["decode"]},
    ]
    fleet = read({"ranks": entries}).resolve(LLAMA)
    pre, dec = fleet.kinds
    assert pre.roles == ("kv_write", "prefill")
    assert dec.roles == ("decode", "kv_write")
    assert set(pre.decision.groups["full"].choices) == {"prefill", "kv_write"}
    for name in ("page_size", "kv_cache_dtype", "kv_layout"):
        assert pre.decision.values[name] == dec.decision.values[name]
    assert fleet.mixed == []
    whole = read({"ranks": [{"device": "cuda:h200"}, {"device": "rocm:mi300x"}]}).resolve(LLAMA)
    assert set(whole.kinds[0].decision.groups["full"].choices) == {"prefill", "decode", "kv_write"}


def test_an_encoder_runs_with_prefill_unless_ranks_are_for_it() -> None:
    model = ModelSpec.from_hf_config(MODELS / "qwen2.5-vl-7b.json")
    encoders = {n for n, g in model.groups.items() if "encode" in g.roles}
    two = [{"device": "cuda:h200", "roles": ["prefill"]}, {"device": "cuda:h200", "roles": ["decode"]}]
    assert encoders <= read({"ranks": two}).resolve(model).decision_of(0).groups.keys()
    three = [*two, {"device": "cuda:sm_80", "roles": ["encode"]}]
    fleet = read({"ranks": three}).resolve(model)
    assert not encoders & fleet.decision_of(0).groups.keys()
    assert encoders == fleet.decision_of(2).groups.keys()
    assert "page_size" in fleet.decision_of(0).values


def test_no_answer_names_the_ranks_and_what_leaving_them_out_gives() -> None:
    fleet = read({"ranks": [{"device": "cuda:h200", "count": 8}, {"device": "rocm:mi300x", "count": 8}]})
    with pytest.raises(NoBackendError) as e:
        fleet.resolve(LLAMA, backend="fa3", page_size=32)
    assert e.value.code == "no_backend"
    assert "ranks 8 to 15 (rocm:gfx942): no installed plugin offers backend 'fa3'" in e.value.text
    assert any(r.startswith("without ranks 8 to 15 (rocm:gfx942): fa3 / fa3") for r in e.value.relaxations)
    assert any(r.startswith("without backend=fa3: ") for r in e.value.relaxations)
    assert e.value.rejections
    assert all(r.ranks == "ranks 8 to 15 (rocm:gfx942)" for r in e.value.rejections)
    again = [RankRejection.from_json(r.to_json()) for r in e.value.rejections]
    assert [r.text for r in again] == [r.text for r in e.value.rejections]


A, B = (Device(platform=p, arch="x1") for p in "ab")


def member(device: Device, ranks: str, **accepts: Any) -> Member:
    """Ranks with one kernel, and a writer that takes anything."""
    common: dict[str, Any] = {"dtype": ANY, "head_dim": ANY, "graph": ANY, "kv_layout": ["NHD", "HND"]}
    rows = [
        BackendSpec(backend="k", role=r, platform=device.platform, tier="BEST", accepts={**common, **accepts})
        for r in ("prefill", "decode")
    ]
    rows.append(BackendSpec(backend="w", role="kv_write", platform=device.platform, tier="BEST", accepts=common))
    accept = {"graph": ANY}
    rows.append(BackendSpec(backend="unfused", role="allreduce_fusion", platform=device.platform, accepts=accept))
    catalog = Catalog({str(device): DeviceCatalog(tuple(rows))})
    return Member(where=ranks, device=device, catalog=catalog, installed=Installed())


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ({"page_size": [64]}, {"page_size": [16, 32]}, "page_size: ranks 0 to 7 can take 64; rank 8 can take 16, 32"),
        ({"graph": ["full"]}, {"graph": ["none"]}, "graph: ranks 0 to 7 can take full; rank 8 can take none"),
        (
            {"kv_layout": ["NHD"]},
            {"kv_layout": ["HND"]},
            "kv_layout of group full: ranks 0 to 7 can take NHD; rank 8 can take HND",
        ),
        ({"page_size": [64]}, {"page_size": [64]}, ""),
    ],
)
def test_kinds_that_cannot_share_a_value_are_named_with_what_each_takes(a: Any, b: Any, says: str) -> None:
    members, options = [member(A, "ranks 0 to 7", **a), member(B, "rank 8", **b)], EngineOptions()
    if not says:
        assert len(resolve_jointly(members, LLAMA, options)) == 2
        return
    with pytest.raises(NoBackendError) as e:
        resolve_jointly(members, LLAMA, options)
    assert says in e.value.text
    assert {r.partition(":")[0] for r in e.value.relaxations} == {"without ranks 0 to 7", "without rank 8"}
    assert any(r.code == "conflict" and r.ranks == "rank 8" for r in e.value.rejections)


def test_prefill_and_decode_need_not_share_a_graph_mode() -> None:
    a, b = member(A, "rank 0", graph=["full"]), member(B, "rank 1", graph=["none"])
    sides = [replace(a, roles=frozenset({"prefill", "kv_write"})), replace(b, roles=frozenset({"decode", "kv_write"}))]
    assert [d.values["graph"] for d in resolve_jointly(sides, LLAMA, EngineOptions())] == ["full", "none"]


def test_a_rank_that_differs_is_named_and_tolerated_when_asked() -> None:
    one = said()
    other = json.loads(json.dumps(one))
    other["plugins"]["cuda"]["version"] = "0.2"
    with pytest.raises(FleetError, match=r"rank 1 has plugin cuda attn-plugin-cuda 0\.2, the others plugin cuda") as e:
        decide([one, other, one], LLAMA)
    assert e.value.ranks == (1,)
    assert decide([one, other, one], LLAMA, tolerate=True).size == 3  # it declares the same things all the same
    del other["plugins"]["cuda"]
    fleet = decide([one, other, one], LLAMA, tolerate=True)
    assert fleet.decision_of(0).backend("decode") == "fa3"
    assert fleet.decision_of(1).groups["full"].choices["decode"].plugin == "core"


def test_a_failed_plugin_is_told_and_other_sources_are_refused_always() -> None:
    one = said()
    failed = json.loads(json.dumps(one))
    failed["plugins"]["rocm"] |= {"works": False, "status": "failed", "error": "boom"}
    with pytest.raises(FleetError, match=r"rank 1 has plugin rocm .* failed \(boom\), the others plugin rocm"):
        decide([one, failed], LLAMA)
    other = json.loads(json.dumps(one))
    other["plugins"]["cuda"]["declares"] = "0" * 16
    with pytest.raises(FleetError, match=r"rank 1 \(cuda:sm_90\): plugin cuda .* declares other things there"):
        decide([one, other], LLAMA, tolerate=True)


def test_packages_are_compared_between_equal_devices_only() -> None:
    old = said(with_packages={"cuda": "12.1"})
    decide([said(), said("rocm:mi300x")], LLAMA)
    with pytest.raises(FleetError, match=r"rank 2 has cuda 12\.1, the other cuda:sm_90 ranks cuda "):
        decide([said(), said(), old], LLAMA)
    fleet = decide([said(), said(), old], LLAMA, tolerate=True)
    assert len(fleet.kinds) == 2
    assert any(r.code == "version" and r.ranks == "rank 2 (cuda:sm_90)" for r in fleet.rejections)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attn_core": "9.9"}, r"rank 1 runs attn-core 9\.9"),
        ({"wire": 2}, r"rank 1 runs attn-core .* \(wire format 2\)"),
        ({"error": "ProbeError: no driver"}, "rank 1 failed: ProbeError: no driver"),
        ({"asks": "0" * 16}, "rank 1 asks another question"),
        ({"roles": ["chat"]}, "rank 1: unknown role 'chat'"),
    ],
)
def test_what_cannot_be_decided_names_the_rank(change: dict[str, Any], says: str) -> None:
    with pytest.raises((FleetError, BadInputError), match=says):
        decide([said(), {**said(), **change}, said()], LLAMA)


def test_rubbish_names_the_rank() -> None:
    with pytest.raises(FleetError, match="rank 1 sent 'hello', not a description"):
        decide([json.dumps(said()), "hello"], LLAMA)
    with pytest.raises(FleetError, match="rank 7 failed: ValueError: x"):
        decide([said(), failure(ValueError("x"))], LLAMA, ranks=[0, 7])
    with pytest.raises(FleetError, match="rank 0 said nothing of asks, device"):
        decide([{"wire": 1, "attn_core": said()["attn_core"]}], LLAMA)
    with pytest.raises(BadInputError, match="at least one rank"):
        decide([], LLAMA)
    with pytest.raises(BadInputError, match="2 descriptions need as many different ranks"):
        decide([said(), said()], LLAMA, ranks=[1, 1])


def test_where_a_device_sits_makes_no_kind() -> None:
    base = simulate("cuda:h200")
    eight = [replace(base.device, index=i, bus_id=f"0000:{i:02x}:00.0") for i in range(8)]
    texts = {json.dumps(describe(LLAMA, platform=simulate(d)), sort_keys=True) for d in eight}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("fleet", "says"),
    [
        ({}, "no list of ranks; expected"),
        ({"ranks": []}, "no list of ranks"),
        ({"ranks": [{"device": "cuda:h200"}], "rank": 1}, "unknown key 'rank'"),
        ({"ranks": ["cuda:h200"]}, r"ranks\[0\]: is str, not an object"),
        ({"ranks": [{"devices": "cuda:h200"}]}, r"ranks\[0\]: unknown key 'devices'; did you mean 'device'"),
        ({"ranks": [{"count": 2}]}, r"ranks\[0\]: device=None must be text"),
        ({"ranks": [{"device": "cuda:h900"}]}, "unknown device 'cuda:h900'"),
        ({"ranks": [{"device": "cuda:h200", "count": 0}]}, r"ranks\[0\]: count=0 must be a positive integer"),
        ({"ranks": [{"device": "cuda:h200", "roles": "prefill"}]}, "roles='prefill' must be a list"),
        ({"ranks": [{"device": "cuda:h200", "roles": ["prefil"]}]}, "unknown role 'prefil'; did you mean 'prefill'"),
        ({"ranks": [{"device": "cuda:h200", "roles": ["prefill"]}]}, "no rank runs decode"),
        ({"ranks": [{"device": "cuda:h200", "with": ["cuda"]}]}, "must map packages to versions"),
        ({"ranks": [{"device": "cuda:h200", "without": "cuda"}]}, "must be a list of packages"),
    ],
)
def test_a_fleet_that_cannot_be_read_says_where(fleet: Any, says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        read(fleet).resolve(LLAMA)


def test_equal_entries_are_one_kind_and_packages_make_kinds() -> None:
    entries = [{"device": "cuda:h200", "count": 2}, {"device": "rocm:mi300x"}, {"device": "cuda:h200", "count": 3}]
    fleet = read({"ranks": entries}).resolve(LLAMA)
    assert [str(k) for k in fleet.kinds] == ["ranks 0, 1 and 3 to 5 (cuda:sm_90)", "rank 2 (rocm:gfx942)"]
    entries = [{"device": "cuda:h200"}, {"device": "cuda:h200", "with": {"cuda": "12.1"}}]
    assert len(read({"ranks": entries}).resolve(LLAMA).kinds) == 2


def test_a_saved_fleet_decision_that_is_none() -> None:
    for text in ("{}", "[]", "hello", '{"schema": 9}'):
        with pytest.raises(BadInputError):
            FleetDecision.from_json(text)
    with pytest.raises(BadInputError, match="rank=3 is not one of the 1 ranks"):
        read({"ranks": [{"device": "cuda:h200"}]}).resolve(LLAMA).decision_of(3)


def test_a_uniform_engine_over_two_vendors_and_plugins_are_those_given() -> None:
    fleet = read({"ranks": [{"device": "cuda:h200"}, {"device": "rocm:mi300x"}]}).resolve(GPT_OSS, uniform="all")
    for kind in fleet.kinds:
        choices = [g.choices for g in kind.decision.groups.values()]
        assert len({c.backend for by_role in choices for r, c in by_role.items() if r != "kv_write"}) == 1
    assert decide([said()], LLAMA, plugins=installed_plugins()).size == 1


def test_a_rank_says_which_kernels_its_packages_were_built_without() -> None:
    """The others decide for it: a build without fa3 must not get fa3 from them."""
    here = said("cuda:h200")
    fa3 = next(s for s in symbols("cuda:h200") if s.endswith("_vllm_fa3_C"))
    poor = {**here, "packages": {**here["packages"], "vllm": "0.33.0"}, "lacking": {fa3: f"built without {fa3}"}}
    for name in ("flash-attn-3", "sglang-kernel"):
        poor["packages"].pop(name, None)
    full = {**poor, "lacking": {}}
    assert decide([full], LLAMA).decision_of(0).groups["full"].choices["decode"].backend == "fa3"
    assert decide([poor], LLAMA).decision_of(0).groups["full"].choices["decode"].backend != "fa3"


def symbols(device: str) -> set[str]:
    (rows,) = simulate(device).catalog.devices.values()
    return {s for b in rows.backends for r in b.requires for s in getattr(r, "symbols", ())}
