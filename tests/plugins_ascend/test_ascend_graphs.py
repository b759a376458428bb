"""Captured decode steps: every launch with lengths in it is issued again at each fill, and nothing else changes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from captured import capture, prepare, record, wrong
from test_ascend_adapters import ROWS

from attn_core import BadInputError, NoBackendError
from simulators import ascend_npu
from simulators.contract import Misuse
from simulators.harness import (
    DECODE,
    VERIFY,
    Case,
    Mutation,
    bound,
    caught,
    device,
    make_step,
    rows_of,
)
from simulators.standin import installed

FIA, LAUNCHES, WRITE = (f"attn_plugin_ascend.kernels.{name}" for name in ("fia", "launches", "kv_write"))
WIDE = {"options": {"verify_width": 3}, "batch": {"decode_width": 3}}

GRID = [
    Case(name="plain"),
    Case(name="no lse", lse=False),
    Case(name="unequal widths", spec={"head_dim": 192, "v_head_dim": 128}),
    Case(name="heads first, own scale", spec={"scale": 0.3}, options={"kv_layout": "HND"}),
    Case(name="sinks and window", spec={"sinks": True, "sliding_window": 7}),
    Case(name="float16", spec={"dtype": "float16"}),
    Case(name="verify", **WIDE),
    Case(name="mla", spec={"kind": "mla"}, lse=False),
    Case(name="mla, padded heads", spec={"kind": "mla", "num_heads": 5}, lse=False),
    Case(name="mla verify", spec={"kind": "mla"}, lse=False, **WIDE),
]


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_replays(case):
    assert not wrong(ROWS, case, ascend_npu.stand_in())


def two_plans() -> list[str]:
    """Two graphs of one group and one of another, filled and replayed crosswise."""
    npu, case = ascend_npu.stand_in(), GRID[0]
    made = [capture(ROWS, case, npu, seed=1), capture(ROWS, GRID[4], npu, seed=2)]
    made.append(capture(ROWS, case, npu, seed=3, group=made[0].group))
    found = []
    for lengths in ((5, 200), (9, 9, 9)):
        batches = [m.fill([n + i for n in lengths]) for i, m in enumerate(made)]
        for m in made:
            m.inputs()
        for m in reversed(made):
            m.replay()
        for m, batch in zip(made, batches):
            found += m.wrong(batch)
    return found


def test_captured_plans_in_flight():
    assert not two_plans()


def test_groups_of_one_model_in_one_graph():
    """Windowed and full layers have a plan each; filling one does not touch the other's launches."""
    npu = ascend_npu.stand_in()
    made = [prepare(ROWS, case, npu, seed=i) for i, case in enumerate((GRID[0], GRID[4]))]
    record(npu, *made)
    for lengths in ((9, 130), (1, 2, 257)):
        batches = [m.fill(lengths) for m in made]
        for m in made:
            m.inputs()
        made[0].replay()
        assert not [w for m, batch in zip(made, batches) for w in m.wrong(batch)]


def refusals() -> list[str]:
    """What must raise, and did not."""
    npu = ascend_npu.stand_in()
    with installed(npu):
        group = bound(ROWS, Case(name="", lengths=DECODE, options={"graph": "decode"}))
        graphs = importlib.import_module("torch_npu.npu.graphs")
    made = make_step(group, Case(name="", lengths=DECODE))
    graph: Any = graphs.NPUGraph()
    try:
        with graphs.graph(graph):
            made.run()
    except BadInputError as e:
        return [] if "capture=" in str(e) else [str(e)]
    return ["a plan without capture= was captured"]


def test_a_plan_that_was_made_without_capture_cannot_be_captured():
    assert not refusals()


def test_a_captured_plan_holds_no_memory_of_the_graph():
    """What is made for one call lies in the graph's pool, and must be free for the next layer."""
    made = capture(ROWS, GRID[0], ascend_npu.stand_in())
    (first, _) = made.plan.decode.launches._launches
    held = {id(first.issue.keywords["query"]), *(id(t) for t in first.issue.keywords["out"])}
    assert not held & {id(made.q), *(id(t) for o in made.outputs for t in o)}
    assert first.issue.keywords["query"].data_ptr() == made.q.data_ptr()


def test_every_layer_shares_one_workspace():
    npu = ascend_npu.stand_in()
    made = capture(ROWS, GRID[0], npu, layers=3)
    assert len(npu.names("_npu_fused_infer_attention_score_get_max_workspace")) == 1
    assert len({launch.issue.keywords["workspace"].data_ptr() for launch in made.plan.decode.launches._launches}) == 1


def test_a_second_replay_without_a_fill_waits_for_ever():
    made = capture(ROWS, GRID[0], ascend_npu.stand_in())
    for times in (1, 2):
        made.fill((9, 3))
        made.replay()
        if times == 2:
            with pytest.raises(Misuse, match="for ever"):
                made.replay()


def test_prefill_is_never_captured():
    """Graphs hold decode steps only: a graph of whole steps is refused with its reason."""
    with pytest.raises(NoBackendError, match="graph=full"):
        bound(ROWS, Case(name="", options={"graph": "full"}))


@pytest.mark.parametrize("arch", ["910b", "910c", "950"])
def test_what_is_offered(arch):
    """Renewing captured launches is documented for A2 and A3, not for A5."""
    rows = rows_of("ascend", device("ascend", arch), "ascend")
    with installed(ascend_npu.stand_in()):
        assert bound(rows, Case(name="")).graph == ("piecewise" if arch == "950" else "decode")
        if arch == "950":
            with pytest.raises(NoBackendError, match="A2 and A3"):
                bound(rows, Case(name="", options={"graph": "decode"}))


@pytest.mark.parametrize("graph", ["piecewise", "none"])
def test_other_graphs_need_nothing_of_it(graph):
    npu = ascend_npu.stand_in()
    with installed(npu):
        group = bound(ROWS, Case(name="", lengths=DECODE, options={"graph": graph}))
    made = make_step(group, Case(name="", lengths=VERIFY))
    made.run()
    assert not [n for n, _ in npu.calls if "graphs" in n or "streams" in n]


def everything() -> Iterator[Any]:
    for case in (*GRID[:3], GRID[4], *GRID[6:8]):
        yield lambda case=case: wrong(ROWS, case, ascend_npu.stand_in())
    yield refusals
    yield two_plans


MUTATIONS = [
    Mutation("launches not issued again", FIA, "self.launches.again(self.changing)", "pass"),
    Mutation("lengths of the step before", FIA, "        self.changing = {self._names.query_lens: query_lens, self",
             "        self.changing = getattr(self, 'changing', None) or {self._names.query_lens: query_lens, self", 2),
    Mutation("pages of the batch", FIA, "table = self.launches.table(table)", "self.launches.table(table)"),
    Mutation("recorded without a capture", FIA, "if capturing():", "if True:", 2),
    Mutation("captured as an eager call", FIA, "if capturing():", "if False:", 2),
    Mutation("plans without capture= captured as they are", FIA, "if step.launches is None:\n            raise BadInputError(",
             "if step.launches is None:\n            return attend(**temporary, **lasting, **step.keywords)\n"
             "            raise BadInputError("),
    Mutation("workspace of the captured step", FIA, "{**step.changing, names.key_lens: step.launches.longest}",
             "step.changing"),
    Mutation("output as wide as q", FIA, "query.new_empty(*query.shape[:2], width)", "query.new_empty(query.shape)"),
    Mutation("rotary part of q dropped", FIA, ', "query_rope": q_rope', ""),
    Mutation("rotary part of keys dropped", FIA, ', "key_rope": rope', ""),
    Mutation("value is the rotary cache", FIA, '"value": latent', '"value": rope'),
    Mutation("LSE in the model's dtype", FIA, "1, dtype=torch.float32) if", "1) if"),
    Mutation("LSE without its last one", FIA, "q.new_empty(*q.shape[:2], 1, dtype", "q.new_empty(*q.shape[:2], dtype"),
    Mutation("only the first layer's launch", LAUNCHES, "for launch in self._launches:", "for launch in self._launches[:1]:"),
    Mutation("only the last layer's launch", LAUNCHES, "for launch in self._launches:", "for launch in self._launches[-1:]:"),
    Mutation("launches forgotten", LAUNCHES, "self._launches.append(Launch(npu.graph_task_group_end(stream), event, issue))",
             "npu.graph_task_group_end(stream)"),
    Mutation("no wait for the event", LAUNCHES, "        event.wait(stream)\n", ""),
    Mutation("no reset of the event", LAUNCHES, "        event.reset(stream)\n", ""),
    Mutation("reset before the wait", LAUNCHES, "event.wait(stream)\n        event.reset(stream)",
             "event.reset(stream)\n        event.wait(stream)"),
    Mutation("event not recorded", LAUNCHES, "launch.event.record(updates)", "pass"),
    Mutation("one event for all launches", LAUNCHES, "self._npu, self._npu.ExternalEvent()",
             "self._npu, self._launches[0].event if self._launches else self._npu.ExternalEvent()"),
    Mutation("update while the replay runs", LAUNCHES, "npu.current_stream(self._table.device).synchronize()", "pass"),
    Mutation("updates not waited for", LAUNCHES, "        updates.synchronize()\n", ""),
    Mutation("update on the wrong stream", LAUNCHES, "with npu.stream(updates):", "if True:"),
    Mutation("update never ended", LAUNCHES, "npu.graph_task_update_end(updates)", "pass"),
    Mutation("launched outside of an update", LAUNCHES, "npu.graph_task_update_begin(updates, launch.handle)", "pass"),
    Mutation("workspace not given", LAUNCHES, "workspace=self._workspace,", ""),
    Mutation("pages not renewed", LAUNCHES, "self._table[:, :width].copy_(new[:, :width])", "pass"),
    Mutation("the stream is made while capturing", LAUNCHES, "stream = npu.current_stream(outputs[0].device)",
             "stream, _ = npu.current_stream(outputs[0].device), npu.Stream()"),
    Mutation("slots at other addresses", WRITE, "if self._kept:", "if False:"),
    Mutation("slots not renewed", WRITE, "self.slots.copy_(slots)", "pass"),
    Mutation("which keys are written not renewed", WRITE, "self.written.copy_(written)", "pass"),
    Mutation("one plan's launches in all", FIA, "None if capture is None else Launches(npu, weak, b.page_size, capture))",
             "None if capture is None else vars(make).setdefault('kept', Launches(npu, weak, b.page_size, capture)))"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutations_are_caught(mutation):
    assert caught(mutation, everything())
