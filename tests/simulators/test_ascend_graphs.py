"""The stand-in's graphs do what torch_npu's do: one test per quirk that has to do with them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simulators import ascend_npu
from simulators.contract import Misuse, Refused
from simulators.standin import installed

LENGTHS = [3, 130]


@pytest.fixture
def npu():
    with installed(ascend_npu.stand_in()):
        names = ("torch_npu", "torch_npu.npu", "torch_npu.npu.graphs")
        ops, runtime, graphs = (importlib.import_module(n) for n in names)
        yield SimpleNamespace(ops=ops, run=runtime, graphs=graphs, op=ops.npu_fused_infer_attention_score)


def given(npu: Any, **more: Any) -> dict[str, Any]:
    """A call of the .out overload over pages, in v1's words."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, *s, generator=g).bfloat16() for n, s in ((2, (4, 64)), (4, (128, 128)), (4, (128, 128))))
    return {
        "query": q, "key": k, "value": v, "actual_seq_lengths": [1, 2], "actual_seq_lengths_kv": LENGTHS,
        "block_table": torch.tensor([[1, 0], [3, 2]], dtype=torch.int32), "block_size": 128, "num_heads": 4,
        "num_key_value_heads": 2, "scale": 0.2, "input_layout": "TND", **more,
    }  # fmt: skip


def with_outputs(npu: Any, call: dict[str, Any]) -> dict[str, Any]:
    room = npu.ops._npu_fused_infer_attention_score_get_max_workspace(**{**call, "actual_seq_lengths_kv": [300, 300]})
    return {**call, "workspace": room, "out": [torch.empty_like(call["query"]), call["query"].new_empty(1)]}


def captured(npu: Any, call: dict[str, Any], *, events: bool = True, group: bool = True) -> SimpleNamespace:
    """One launch, captured as torch_npu's documents do it."""
    made = SimpleNamespace(graph=npu.graphs.NPUGraph(), event=npu.run.ExternalEvent(), updates=npu.run.Stream())
    with npu.graphs.graph(made.graph):
        made.stream = npu.run.current_stream()
        if events:
            made.event.wait(made.stream)
            made.event.reset(made.stream)
        if group:
            npu.run.graph_task_group_begin(made.stream)
        npu.op.out(**call)
        made.handle = npu.run.graph_task_group_end(made.stream) if group else None
    return made


def update(npu: Any, made: SimpleNamespace, call: dict[str, Any], stream: Any = None) -> None:
    stream = stream or made.updates
    with npu.run.stream(stream):
        npu.run.graph_task_update_begin(stream, made.handle)
        npu.op.out(**call)
        npu.run.graph_task_update_end(stream)
        made.event.record(stream)


def test_quirk_lists_stay_in_a_graph(npu):
    call = with_outputs(npu, given(npu))
    made, lengths = captured(npu, call, events=False, group=False), call["actual_seq_lengths_kv"]
    want = npu.op(**given(npu))[0]
    lengths[:] = [2, 100]
    made.graph.replay()
    assert torch.equal(call["out"][0], want)
    lengths[:] = [3, 130]


def test_quirk_updates_change_a_task(npu):
    call = with_outputs(npu, given(npu))
    made = captured(npu, call)
    for lengths in ([1, 7], [2, 200]):
        call["out"][0].fill_(5.0)
        update(npu, made, {**call, "actual_seq_lengths_kv": lengths})
        assert bool((call["out"][0] == 5).all()), "an update computes nothing"
        made.graph.replay()
        assert torch.equal(call["out"][0], npu.op(**given(npu, actual_seq_lengths_kv=lengths))[0])
        npu.run.current_stream().synchronize()
    with pytest.raises(Misuse, match="other memory"):
        update(npu, made, {**call, "block_table": call["block_table"].clone()})


def test_quirk_updates_want_another_stream(npu):
    call = with_outputs(npu, given(npu))
    made = captured(npu, call)
    with pytest.raises(Refused, match="another stream"):
        update(npu, made, call, made.stream)


def test_quirk_updates_wait_for_the_replay(npu):
    call = with_outputs(npu, given(npu))
    made = captured(npu, call)
    update(npu, made, call)
    made.graph.replay()
    with pytest.raises(Misuse, match="may still be running"):
        update(npu, made, call)
    npu.run.current_stream().synchronize()
    update(npu, made, call)


def test_quirk_replays_wait_for_an_external_event(npu):
    call = with_outputs(npu, given(npu))
    made = captured(npu, call)
    with pytest.raises(Misuse, match="for ever"):
        made.graph.replay()
    update(npu, made, call)
    made.graph.replay()
    with pytest.raises(Misuse, match="for ever"):
        made.graph.replay()
    npu.run.current_stream().synchronize()
    update(npu, made, call)
    update(npu, made, call)
    with pytest.raises(Misuse, match="too early"):
        made.graph.replay()
    made.updates.synchronize()
    made.graph.replay()
    with pytest.raises(Misuse, match="wait for this group"):
        captured(npu, call, events=False)


def test_quirk_captures_do_not_run(npu):
    a, out = torch.ones(3), torch.zeros(3)
    graph = npu.graphs.NPUGraph()
    with npu.graphs.graph(graph):
        assert npu.run.is_current_stream_capturing()
        b = a * 2
        out.copy_(b)
        with pytest.raises(Refused, match="waits"):
            b[0].item()
    assert not npu.run.is_current_stream_capturing()
    assert not out.any()
    a.fill_(4.0)
    graph.replay()
    assert torch.equal(out, torch.full((3,), 8.0))


def test_quirk_captured_workspace_is_given(npu):
    call = with_outputs(npu, given(npu))
    with pytest.raises(Misuse, match="without its workspace"):
        captured(npu, {n: x for n, x in call.items() if n != "workspace"})
    small = npu.ops._npu_fused_infer_attention_score_get_max_workspace(**given(npu, actual_seq_lengths_kv=[1, 1]))
    with pytest.raises(Misuse, match="workspace of"):
        captured(npu, {**call, "workspace": small})


def test_groups_and_updates_are_well_formed(npu):
    call = with_outputs(npu, given(npu))
    made = captured(npu, call)
    for wrong in (npu.run.graph_task_group_begin, npu.run.graph_task_group_end, npu.run.graph_task_update_end):
        with pytest.raises(Refused):
            wrong(made.updates)
    npu.run.graph_task_update_begin(made.updates, made.handle)
    with pytest.raises(Misuse, match="not issued again"):
        npu.run.graph_task_update_end(made.updates)
    with pytest.raises(Misuse, match="another stream"):
        npu.op.out(**call)
