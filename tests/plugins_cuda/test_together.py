"""All CUDA backends in one process: nothing they do for one model reaches another, and calls allocate nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core.errors import MissingKernelError
from attn_plugin_cuda import attn_backends
from simulators import (
    cuda_cutlass_mla,
    cuda_fa2,
    cuda_fa3,
    cuda_fa4,
    cuda_flash_mla,
    cuda_flashinfer,
    cuda_vllm_flash,
)
from simulators.harness import DECODE, RAGGED, Case, bound, device, make_step, rows_of
from simulators.isolation import check_isolation, check_two_devices
from simulators.standin import installed

MLA = {"kind": "mla"}
BACKENDS = {"fa3": "sm_90", "fa2": "sm_80", "flashinfer": "sm_80", "fa4": "sm_100", "trtllm_mha": "sm_100"}
LATENT = {
    "fa3": "sm_90",
    "flashmla": "sm_90",
    "flashinfer": "sm_90",
    "trtllm_mla": "sm_100",
    "cutedsl_mla": "sm_100",
    "cutlass_mla": "sm_100",
}


KERNELS = "attn_plugin_cuda.kernels"
PACKAGES = {  # of one backend, those that the first would hide
    "flash:bind_vllm_fa3": ("fa3", "sm_90"), "flash:bind_upstream_fa3": ("fa3", "sm_90"), "fa2:bind": ("fa2", "sm_80"),
}  # fmt: skip
ENCODER = {"attn_type": "encoder_only", "head_dim": 128}
BOUNDS = {"options": {"host_lengths": "bounds"}, "bounds": (12, 4, 64, 9, 33, 5)}


def make():
    return [
        cuda_fa2.stand_in(), cuda_fa3.stand_in(), cuda_fa3.upstream(), cuda_fa4.stand_in(), cuda_flashinfer.stand_in(),
        *cuda_flash_mla.stand_ins(), cuda_flash_mla.vllm(), cuda_vllm_flash.stand_in(), cuda_cutlass_mla.stand_in(),
    ]  # fmt: skip


def pair(backend, arch, bind=None, **fields):
    only = {} if bind is None else {"bind": f"{KERNELS}.{bind}"}
    rows = rows_of("cuda", device("cuda", arch), backend, **only)
    return rows, Case(**{"name": f"{backend} {arch}", "lse": False, **fields})


PAIRS = [
    *(pair(b, arch) for b, arch in BACKENDS.items()),
    *(pair(*of, bind) for bind, of in PACKAGES.items()),
    *(pair(b, arch, spec=MLA, lengths=DECODE) for b, arch in LATENT.items()),
    pair("fa3", "sm_90", "flash:bind_vllm_fa3", spec=MLA, lengths=DECODE),
    pair("fa4", "sm_100", name="fa4 over 8 bits", options={"kv_cache_dtype": "fp8_e4m3"}),
    pair(
        "flashmla",
        "sm_90",
        name="flashmla over 8 bits",
        spec=MLA,
        lengths=DECODE,
        options={"kv_cache_dtype": "fp8_e4m3"},
    ),
    # two models whose widths are padded differently
    pair("flashinfer", "sm_80", name="32 -> 64", spec={"attn_type": "encoder_only", "head_dim": 32}, lengths=RAGGED),
    pair("flashinfer", "sm_80", name="96 -> 128", spec={"attn_type": "encoder_only", "head_dim": 96}, lengths=RAGGED),
    # FlashInfer's other kernels, of one package
    pair("flashinfer", "sm_100", name="cudnn", spec={**ENCODER, "num_kv_heads": 6}, lengths=RAGGED),
    pair("flashinfer", "sm_110", name="cutlass", spec=ENCODER, lengths=RAGGED),
    pair("flashinfer", "sm_100", name="cudnn over pages", spec={"head_dim": 128}, **BOUNDS),
    pair("flashinfer", "sm_120", name="fmha_v2", spec=ENCODER, lengths=RAGGED, options=BOUNDS["options"]),
    pair("flashinfer_sinks", "sm_80", name="sinks", spec={"sinks": True}),
    pair("flashinfer_sinks", "sm_90", name="wider sinks", spec={"sinks": True, "head_dim": 128}),
]


def test_backends_in_flight_do_not_meet():
    check_isolation(PAIRS, make)


def test_backends_on_two_devices():
    check_two_devices(PAIRS, make)


class Operations(TorchDispatchMode):
    """Lists what runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


VIEWS = {
    "view",
    "unsqueeze",
    "squeeze",
    "transpose",
    "t",
    "alias",
    "slice",
    "split_with_sizes",
    "expand",
    "_unsafe_view",
}
FILLING = [("fa3", "sm_90", None, {}), ("fa3", "sm_90", None, MLA), ("fa3", "sm_90", "flash:bind_vllm_fa3", {}),
           ("fa3", "sm_90", "flash:bind_vllm_fa3", MLA), ("fa2", "sm_80", "flash:bind_vllm_fa2", {}),
           ("flashinfer", "sm_80", None, {}), ("trtllm_mha", "sm_100", None, {}), ("flashinfer", "sm_90", None, MLA),
           ("flashinfer_sinks", "sm_80", None, {"sinks": True}), ("flashinfer_sinks", "sm_120", None, {"sinks": True}),
           ("trtllm_mla", "sm_100", None, MLA), ("cutedsl_mla", "sm_100", None, MLA)]  # fmt: skip


@pytest.mark.parametrize(("backend", "arch", "bind", "spec"), FILLING, ids=lambda x: str(x))
def test_a_decode_call_into_out_makes_views_at_most(backend, arch, bind, spec):
    """Beside what happens inside the vendor's function."""
    rows, case = pair(backend, arch, bind, spec=spec, lengths=DECODE)
    with installed(*make()):
        group = bound(rows, case)
    step = make_step(group, case)
    step.q = step.q.contiguous()
    out = torch.empty(step.q.shape[0], step.q.shape[1], group.bindings["decode"].v_head_dim, dtype=step.q.dtype)
    decode = group._bound["decode"].kernels.call
    decode(step.q, None, None, step.cache, step.plan, out=out, **step.extra)  # what is kept on the cache is there now
    with Operations() as everything:
        decode(step.q, None, None, step.cache, step.plan, out=out, **step.extra)
    with Operations() as inside:
        vendors_part(decode, step, out)
    extra = list(everything.names)
    for name in inside.names:
        extra.remove(name)
    assert set(extra) <= VIEWS, extra


def vendors_part(decode, step, out):
    """The vendor's function alone, called as the adapter called it."""
    closure = [c.cell_contents for c in decode.__closure__ or ()]
    calls = []
    functions = [f for f in closure if hasattr(f, "__signature__")]
    if not functions:  # a wrapper's method
        wrapper = step.plan.decode if hasattr(step.plan.decode, "run") else step.plan.decode.wrapper
        given = watch(wrapper, "run", lambda: decode(step.q, None, None, step.cache, step.plan, out=out, **step.extra))
        wrapper.run(*given[0], **given[1])
        return
    index = next(i for i, c in enumerate(decode.__closure__) if c.cell_contents in functions)
    cell = decode.__closure__[index]
    real = cell.cell_contents

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return real(*args, **kwargs)

    with Pause():
        cell.cell_contents = spy
        decode(step.q, None, None, step.cache, step.plan, out=out, **step.extra)
        cell.cell_contents = real
    args, kwargs = calls[0]
    real(*args, **kwargs)


class Pause:
    """Operations inside are nobody's."""

    def __enter__(self):
        self.guard = torch.utils._python_dispatch._disable_current_modes()
        self.guard.__enter__()

    def __exit__(self, *error):
        self.guard.__exit__(*error)


def watch(owner, name, run):
    given, real = [], getattr(owner, name)

    def spy(*args, **kwargs):
        given.append((args, kwargs))
        return real(*args, **kwargs)

    with Pause():
        setattr(owner, name, spy)
        run()
        delattr(owner, name)
    return given[0]


def test_every_row_binds():
    """Nothing is decided that cannot be bound."""
    for arch in ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"):
        assert [r for r in attn_backends(device=device("cuda", arch)) if r.bind is None] == []


ALL_PACKAGES = [*((*of, None) for of in BACKENDS.items()), *((*of, bind) for bind, of in PACKAGES.items())]


@pytest.mark.parametrize(("backend", "arch", "bind"), ALL_PACKAGES)
def test_a_missing_package_is_named_with_what_to_do(backend, arch, bind):
    with pytest.raises(MissingKernelError, match=r"needed for .*(pip install|build)"):
        bound(*pair(backend, arch, bind))
