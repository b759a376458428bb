"""What vendors' adapters cost on the host, over the bare vendor call: every function of the vendor has an empty body.

``call``: one decode call over calling the vendor's function with the same arguments, the views included that its shapes
ask for. ``plan``: refilling a decode plan, vendors' planners empty, with what is derived from a batch of its own, for
few sequences and for many. CPU time; allocations on a device are not seen here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Adapter:
    """One decode adapter: where its rows are, what the model and the engine are, and what stands in."""

    plugin: str
    backend: str
    arch: str
    stand_ins: tuple[StandIn, ...]
    bind: str | None = None
    """Of rows, where several packages have the backend."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    lse: bool = False
    """Planned with LSE, where it is claimed."""

    @property
    def name(self) -> str:
        features = [*map(str, self.spec.values()), *self.options.values()]
        return " ".join([self.plugin, self.backend, *([self.bind] if self.bind else []), self.arch, *features])

    @property
    def mla(self) -> bool:
        return self.spec == MLA

    @property
    def rows(self) -> Rows:
        only = {"bind": f"attn_plugin_{self.plugin}.kernels.{self.bind}"} if self.bind else {}
        return rows_of(self.plugin, device(self.plugin, self.arch), self.backend, **only)

    def answer(self, sequences: int) -> Any:
        """What the vendor's function returns."""
        heads, width = (4, 512) if self.mla else (8, 128)
        flat = torch.zeros(sequences, heads, width, dtype=torch.bfloat16)
        if self.bind == "fa2:bind" or self.backend in ("flashmla", "trtllm_mla"):  # batched interfaces
            flat = flat[:, None]
        pair = self.backend in ("flashmla", "ascend") or (self.backend == "fa4" and not self.bind)
        return (flat, None) if pair or (self.backend == "aiter" and self.mla) else flat

    def step(self, sequences: int, *, lse: bool) -> Step:
        """A decode step, bound to functions with empty bodies."""
        with installed(*empties(self.stand_ins, self.answer(sequences), torch.zeros(sequences + 1, dtype=torch.int32))):
            spec = self.spec if self.mla else {**HEADS, **self.spec}
            group = bound(self.rows, Case(name="", spec=spec, options=self.options, lse=lse))
        # about as many pages whatever their size: lists of pages are made on the device, which a CPU stands for here
        shortest, more = (7, 4) if group.page_size == 1 else (100, 50)
        lengths = Lengths((1,) * sequences, tuple(shortest + i % more for i in range(sequences)))
        bounds = lengths.kv if "host_lengths" in self.options else None
        made = make_step(group, Case(name="", lengths=lengths, bounds=bounds))
        made.q = tuple(t.contiguous() for t in made.q) if isinstance(made.q, tuple) else made.q.contiguous()
        return made


FLASHINFER = (cuda_flashinfer.stand_in(),)
FLASHMLA = (*cuda_flash_mla.stand_ins(), *FLASHINFER)
ADAPTERS = (
    Adapter("cuda", "fa3", "sm_90", (cuda_fa3.stand_in(),), lse=True),
    Adapter("cuda", "fa3", "sm_90", (cuda_vllm_flash.stand_in(),), bind="flash:bind_vllm_fa3", lse=True),
    Adapter("cuda", "fa3", "sm_90", (cuda_fa3.upstream(),), bind="flash:bind_upstream_fa3", lse=True),
    Adapter("cuda", "fa2", "sm_80", (cuda_vllm_flash.stand_in(8),), bind="flash:bind_vllm_fa2", lse=True),
    Adapter("cuda", "fa2", "sm_80", (cuda_fa2.stand_in(),), bind="fa2:bind", lse=True),
    Adapter("cuda", "fa4", "sm_100", (cuda_fa4.stand_in(),), lse=True),
    Adapter("cuda", "fa4", "sm_100", (cuda_vllm_flash.stand_in(10),), bind="flash:bind_vllm_fa4", lse=True),
    Adapter("cuda", "flashinfer", "sm_80", FLASHINFER, lse=True),
    Adapter("cuda", "flashinfer", "sm_120", FLASHINFER),
    Adapter("cuda", "flashinfer_sinks", "sm_80", FLASHINFER, spec={"sinks": True}),
    Adapter("cuda", "flashinfer_sinks", "sm_120", FLASHINFER, spec={"sinks": True}),
    Adapter("cuda", "flashinfer", "sm_100", FLASHINFER, options={"host_lengths": "bounds"}),
    Adapter("cuda", "trtllm_mha", "sm_100", FLASHINFER),
    Adapter("cuda", "flashinfer", "sm_90", FLASHINFER, spec=MLA),
    Adapter("cuda", "fa3", "sm_90", (cuda_fa3.stand_in(),), spec=MLA, lse=True),
    Adapter("cuda", "fa3", "sm_90", (cuda_vllm_flash.stand_in(),), bind="flash:bind_vllm_fa3", spec=MLA, lse=True),
    Adapter("cuda", "flashmla", "sm_90", FLASHMLA, spec=MLA, lse=True),
    Adapter("cuda", "fa3", "sm_90", (cuda_fa3.upstream(),), bind="flash:bind_upstream_fa3", spec=MLA, lse=True),
    Adapter("cuda", "cutlass_mla", "sm_100", (cuda_cutlass_mla.stand_in(), *FLASHINFER), spec=MLA, lse=True),
    Adapter("cuda", "trtllm_mla", "sm_100", FLASHINFER, spec=MLA),
    Adapter("cuda", "cutedsl_mla", "sm_100", FLASHINFER, spec=MLA),
    Adapter("musa", "fa3", "mp31", (musa_mate.stand_in(),), lse=True),
    Adapter("musa", "fa3", "mp31", (musa_mate.stand_in(),), spec=MLA, lse=True),
    Adapter("musa", "flashmla", "mp31", (musa_mate.stand_in(),), spec=MLA, lse=True),
    Adapter("rocm", "aiter", "gfx942", (rocm_aiter.stand_in(),)),
    Adapter("rocm", "aiter", "gfx942", (rocm_aiter.stand_in(),), bind="unified:bind"),
    Adapter("rocm", "aiter", "gfx942", (rocm_aiter.stand_in(),), spec=MLA, lse=True),
    Adapter("rocm", "wave", "gfx942", (rocm_wave.stand_in(),)),
    Adapter("ascend", "ascend", "910b", (ascend_npu.stand_in(),), lse=True),
    Adapter("ascend", "ascend", "910b", (ascend_npu.stand_in(),), spec=MLA),
    Adapter("ascend", "ascend", "310p", (ascend_npu.stand_in(),), spec={"dtype": "float16"}),
    Adapter("intel", "intel_xpu", "bmg", (intel_xpu.stand_in(),)),
    Adapter("intel", "intel_xpu", "bmg", (intel_xpu_mla.stand_in(),), spec=MLA),
)


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


def adapters() -> Iterator[Result]:
    for adapter in ADAPTERS:
        yield call_cost(adapter)
        yield from plan_cost(adapter)


def call_cost(adapter: Adapter) -> Result:
    step, answer = adapter.step(4, lse=False), adapter.answer(4)
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
    return result(f"{adapter.name}: decode call over the vendor's", added, "us CPU", limit=1)


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


def plan_cost(adapter: Adapter) -> Iterator[Result]:
    for sequences in (4, 260):
        times = [t * 1e6 for t in _plan_time(adapter, sequences)]
        yield result(
            f"{adapter.name}: plan(out=) of {sequences} sequences", times, "us CPU", limit=50 + 0.1 * sequences
        )


def _plan_time(adapter: Adapter, sequences: int) -> list[float]:
    step = adapter.step(sequences, lse=adapter.lse)
    plan, kept, b = step.group._bound["decode"].kernels.plan, step.plan.decode, step.batch
    known: dict[str, Any] = {} if b.exact else {"exact": False, "kv_lens_device": b.kv_lens_device}
    times = []
    for _ in range(7):  # a batch of its own for every call: deriving offsets and page lists is part of the price
        batches = [Batch(b.query_lens, b.kv_lens, block_table=b.block_table, **known) for _ in range(200)]
        start = time.process_time()
        for batch in batches:
            plan(batch, out=kept)
        times.append((time.process_time() - start) / len(batches))
    return sorted(times)


ALL = (adapters,)
