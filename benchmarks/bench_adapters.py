"""What vendors' adapters cost on the host, over the bare vendor call: every function of the vendor has an empty body.

``call``: one decode call over calling the vendor's function with the same arguments, the views included that its shapes
ask for. ``plan``: refilling a decode plan, vendors' planners empty, with what is derived from a batch of its own, for
few sequences and for many. CPU time; allocations on a device are not seen here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Result, cpu_time, result

from attn_core import Batch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from numerics.kernel_cases import Lengths, Step
from simulators import (
    ascend_npu,
    cuda_cutlass_mla,
    cuda_fa2,
    cuda_fa3,
    cuda_fa4,
    cuda_flash_mla,
    cuda_flashinfer,
    cuda_vllm_flash,
    intel_xpu,
    intel_xpu_mla,
    musa_mate,
    rocm_aiter,
    rocm_wave,
)
from simulators.harness import Case, Rows, bound, device, make_step, rows_of
from simulators.standin import Empty, StandIn, installed

MLA = {"kind": "mla"}
HEADS = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
SCHEDULE = cuda_flash_mla.FlashMLASchedMeta
ADAPTERS: tuple[tuple[str, str, str, dict[str, Any], bool, tuple[StandIn, ...]], ...] = (
    ("cuda", "fa3", "sm_90", {}, True, (cuda_fa3.stand_in(),)),
    ("cuda", "fa3 flash:bind_vllm_fa3", "sm_90", {}, True, (cuda_vllm_flash.stand_in(),)),
    ("cuda", "fa3 flash:bind_upstream_fa3", "sm_90", {}, True, (cuda_fa3.upstream(),)),
    ("cuda", "fa2 flash:bind_vllm_fa2", "sm_80", {}, True, (cuda_vllm_flash.stand_in(8),)),
    ("cuda", "fa2 fa2:bind", "sm_80", {}, True, (cuda_fa2.stand_in(),)),
    ("cuda", "fa4", "sm_100", {}, True, (cuda_fa4.stand_in(),)),
    ("cuda", "fa4 flash:bind_vllm_fa4", "sm_100", {}, True, (cuda_vllm_flash.stand_in(10),)),
    ("cuda", "flashinfer", "sm_80", {}, True, (cuda_flashinfer.stand_in(),)),
    ("cuda", "flashinfer", "sm_120", {}, False, (cuda_flashinfer.stand_in(),)),
    ("cuda", "flashinfer_sinks", "sm_80", {"sinks": True}, False, (cuda_flashinfer.stand_in(),)),
    ("cuda", "flashinfer_sinks", "sm_120", {"sinks": True}, False, (cuda_flashinfer.stand_in(),)),
    ("cuda", "trtllm_mha", "sm_100", {}, False, (cuda_flashinfer.stand_in(),)),
    ("cuda", "flashinfer", "sm_90", MLA, False, (cuda_flashinfer.stand_in(),)),
    ("cuda", "fa3", "sm_90", MLA, True, (cuda_fa3.stand_in(),)),
    ("cuda", "fa3 flash:bind_vllm_fa3", "sm_90", MLA, True, (cuda_vllm_flash.stand_in(),)),
    ("cuda", "flashmla", "sm_90", MLA, True, (*cuda_flash_mla.stand_ins(), cuda_flashinfer.stand_in())),
    ("cuda", "fa3 flash:bind_upstream_fa3", "sm_90", MLA, True, (cuda_fa3.upstream(),)),
    ("cuda", "cutlass_mla", "sm_100", MLA, True, (cuda_cutlass_mla.stand_in(), cuda_flashinfer.stand_in())),
    ("cuda", "trtllm_mla", "sm_100", MLA, False, (cuda_flashinfer.stand_in(),)),
    ("cuda", "cutedsl_mla", "sm_100", MLA, False, (cuda_flashinfer.stand_in(),)),
    ("musa", "fa3", "mp31", {}, True, (musa_mate.stand_in(),)),
    ("musa", "fa3", "mp31", MLA, True, (musa_mate.stand_in(),)),
    ("musa", "flashmla", "mp31", MLA, True, (musa_mate.stand_in(),)),
    ("rocm", "aiter", "gfx942", {}, False, (rocm_aiter.stand_in(),)),
    ("rocm", "aiter unified:bind", "gfx942", {}, False, (rocm_aiter.stand_in(),)),
    ("rocm", "aiter", "gfx942", MLA, True, (rocm_aiter.stand_in(),)),
    ("rocm", "wave", "gfx942", {}, False, (rocm_wave.stand_in(),)),
    ("ascend", "ascend", "910b", {}, True, (ascend_npu.stand_in(),)),
    ("ascend", "ascend", "910b", MLA, False, (ascend_npu.stand_in(),)),
    ("ascend", "ascend", "310p", {"dtype": "float16"}, False, (ascend_npu.stand_in(),)),
    ("intel", "intel_xpu", "bmg", {}, False, (intel_xpu.stand_in(),)),
    ("intel", "intel_xpu", "bmg", MLA, False, (intel_xpu_mla.stand_in(),)),
)
"""plugin, backend (with what binds it, where several packages have it), arch, fields of the spec, whether LSE is
claimed, what stands in."""


ANSWERS = {
    "is_current_stream_capturing": lambda: False,
    "get_npu_format": lambda t: 29,
    "sm100_cutlass_mla_get_workspace_size": lambda *a: 0,
    "flash_mla_get_workspace_size": lambda *a: 0,
    "decode_attention_intermediate_arrays_shapes": lambda rows, width, heads, n: (
        (n, rows, heads, width),
        (n, rows, heads),
    ),
    "empty_with_format": lambda size, dtype, device, acl_format: torch.zeros(size, dtype=dtype, device=device),
}
"""Of functions that say or make something."""


class Recorder:
    """A vendor's function that remembers how it was called."""

    def __init__(self, vendor: Callable[..., Any]) -> None:
        self.vendor = vendor
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        return self.vendor(*args, **kwargs)


def empties(stand_ins: tuple[StandIn, ...], answer: Any, scheduled: torch.Tensor) -> tuple[StandIn, ...]:
    """The same packages with empty bodies; calls answer ``answer``, planners a tensor."""

    def body(name: str) -> Any:
        if (leaf := name.rpartition(".")[2]) in ANSWERS:
            return ANSWERS[leaf]
        if "metadata" in name or "Metadata" in name:
            if name.endswith("get_mla_metadata"):
                return lambda *a: (scheduled, scheduled) if a else (SCHEDULE(), None)
            if name.endswith("get_mla_decoding_metadata"):
                return lambda *a, **k: (scheduled, scheduled)
            return lambda *a, **k: scheduled
        return lambda *a, **k: answer

    made = []
    for s in stand_ins:
        functions = {
            n: body(n) for n, f in s.contract.functions.items() if f.kind in ("function", "static", "torch_op")
        }
        made.append(Empty(s.contract, {**functions, **_wrappers(s, answer)}, s.values))
    return tuple(made)


def _wrappers(s: StandIn, answer: Any) -> dict[str, type]:
    run = {"run": staticmethod(lambda *a, **k: answer), "plan": staticmethod(lambda *a, **k: None)}
    return {n: type("Wrapper", (), run) for n, f in s.contract.functions.items() if f.kind == "class"}


def decode_step(rows: Rows, spec: dict[str, Any], lse: bool, sequences: int, stand_ins: tuple[StandIn, ...]) -> Step:
    with installed(*stand_ins):
        group = bound(
            rows,
            Case(name="", spec=spec if spec == MLA else {**HEADS, **spec}, lse=lse),
        )
    # about as many pages whatever their size: lists of pages are made on the device, which a CPU stands for here
    shortest, more = (7, 4) if group.page_size == 1 else (100, 50)
    lengths = Lengths((1,) * sequences, tuple(shortest + i % more for i in range(sequences)))
    made = make_step(group, Case(name="", lengths=lengths))
    made.q = tuple(t.contiguous() for t in made.q) if isinstance(made.q, tuple) else made.q.contiguous()
    return made


def answer_for(spec: dict[str, Any], backend: str, sequences: int) -> Any:
    heads, width = (4, 512) if spec == MLA else (8, 128)
    flat = torch.zeros(sequences, heads, width, dtype=torch.bfloat16)
    if backend in ("fa2 fa2:bind", "flashmla", "trtllm_mla"):  # batched interfaces
        flat = flat[:, None]
    pair = backend in ("fa4", "flashmla", "ascend") or (backend == "aiter" and spec == MLA)
    return (flat, None) if pair else flat


def adapters() -> Iterator[Result]:
    for plugin, backend, arch, spec, lse, stand_ins in ADAPTERS:
        name = f"{plugin} {backend} {arch}{' mla' if spec == MLA else ''}"
        name_of_backend, _, bind = backend.partition(" ")
        only = {"bind": f"attn_plugin_{plugin}.kernels.{bind}"} if bind else {}
        rows = rows_of(plugin, device(plugin, arch), name_of_backend, **only)
        yield call_cost(name, rows, spec, backend, stand_ins)
        yield from plan_cost(name, rows, spec, backend, lse, stand_ins)


def call_cost(name: str, rows: Rows, spec: dict[str, Any], backend: str, stand_ins: tuple[StandIn, ...]) -> Result:
    answer = answer_for(spec, backend, 4)
    step = decode_step(rows, spec, False, 4, empties(stand_ins, answer, torch.zeros(5, dtype=torch.int32)))
    kernel = step.group._bound["decode"].kernels.call
    more = {"sinks": step.group.prepare_sinks(step.extra["sinks"])} if "sinks" in step.extra else {}
    q = step.q[0] if isinstance(step.q, tuple) else step.q
    out = torch.empty(*q.shape[:2], step.group.bindings["decode"].v_head_dim, dtype=q.dtype)

    args, given = (step.q, None, None, step.cache, step.plan), {"out": out, **more}

    def call() -> Any:
        return kernel(*args, **given)

    bare = bare_call(call, step, answer)
    through, alone = cpu_time(call), cpu_time(bare)
    added = [(a - b) * 1e6 for a, b in zip(sorted(through), sorted(alone))]
    return result(f"{name}: decode call over the vendor's", added, "us CPU", limit=1)


def bare_call(call: Callable[[], Any], step: Step, answer: Any) -> Callable[[], Any]:
    """The vendor's function with the arguments that the adapter passes, found by watching one call."""
    for cell in cells(step.group._bound["decode"].kernels.call):
        vendor = cell.cell_contents
        if getattr(vendor, "__name__", "") == "<lambda>" and vendor.__module__ == __name__:
            cell.cell_contents = recorder = Recorder(vendor)
            call()
            cell.cell_contents = vendor
            if recorder.given != ((), {}):
                return with_views(vendor, *recorder.given, step.q, answer)
    wrapper = step.plan.decode if hasattr(step.plan.decode, "run") else step.plan.decode.wrapper
    run = wrapper.run
    wrapper.run = recorder = Recorder(run)
    call()
    wrapper.run = run
    args, kwargs = recorder.given
    return lambda: run(*args, **kwargs)


def cells(function: Any) -> Iterator[Any]:
    """What a function closes over, and what functions among that do."""
    for cell in getattr(function, "__closure__", None) or ():
        yield cell
        yield from cells(cell.cell_contents)


def with_views(
    vendor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], q: torch.Tensor, answer: Any
) -> Callable[[], Any]:
    """The bare call on the engine's packed tensors: the views that the vendor's shapes ask for are the vendor's."""
    first, *rest = args or (None,)
    if first is not None and first.dim() == 4:
        rows, queries, heads, width = map(int, first.shape)
        pair = isinstance(answer, tuple)
        out_width = (answer[0] if pair else answer).shape[-1]

        def batched() -> torch.Tensor:
            got = vendor(q.view(rows, queries, heads, width), *rest, **kwargs)
            return (got[0] if pair else got).view(-1, heads, out_width)

        return batched
    if isinstance(q, tuple):
        return lambda: vendor(*args, **kwargs)
    if latent_as := {"qv", "q_v"} & set(kwargs):
        (name,) = latent_as
        widths = (kwargs.pop(name).shape[-1], first.shape[-1])

        def split() -> torch.Tensor:
            latent, rope = q.split_with_sizes(widths, -1)
            return vendor(rope, *rest, **{name: latent}, **kwargs)

        return split
    if args[2:] and args[2].shape[-1] < q.shape[-1] and args[2].data_ptr() == q.data_ptr():  # after output and LSE
        before, after, sizes = args[:2], args[4:], (args[2].shape[-1], args[3].shape[-1])
        return lambda: vendor(*before, *q.split_with_sizes(sizes, -1), *after, **kwargs)
    return lambda: vendor(*args, **kwargs)


def plan_cost(
    name: str, rows: Rows, spec: dict[str, Any], backend: str, lse: bool, stand_ins: tuple[StandIn, ...]
) -> Iterator[Result]:
    for sequences in (4, 260):
        times = [t * 1e6 for t in _plan_time(rows, spec, backend, lse, sequences, stand_ins)]
        yield result(f"{name}: plan(out=) of {sequences} sequences", times, "us CPU", limit=50 + 0.1 * sequences)


def _plan_time(
    rows: Rows, spec: dict[str, Any], backend: str, lse: bool, sequences: int, stand_ins: tuple[StandIn, ...]
) -> list[float]:
    answer = answer_for(spec, backend, sequences)
    schedule = torch.zeros(sequences + 1, dtype=torch.int32)
    step = decode_step(rows, spec, lse, sequences, empties(stand_ins, answer, schedule))
    plan, kept, b = step.group._bound["decode"].kernels.plan, step.plan.decode, step.batch
    times = []
    for _ in range(7):  # a batch of its own for every call: deriving offsets and page lists is part of the price
        batches = [Batch(b.query_lens, b.kv_lens, block_table=b.block_table) for _ in range(200)]
        start = time.process_time()
        for batch in batches:
            plan(batch, out=kept)
        times.append((time.process_time() - start) / len(batches))
    return sorted(times)


ALL = (adapters,)
