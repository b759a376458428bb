"""The checks for isolation notice adapters that share a step, and adapters that wait for the device."""

from __future__ import annotations

import pytest
import torch

from simulators import cuda_fa3
from simulators.fake_device import OnDevice, devices, unrecorded
from simulators.harness import Case, Mutation, device, mutated, mutations, rows_of
from simulators.isolation import check_isolation, check_two_devices

ROWS = rows_of("cuda", device("cuda", "sm_90"), "fa3")
PAIRS = [(ROWS, Case(name="plain")), (ROWS, Case(name="window", spec={"sliding_window": 5}))]
NEW = "step = Pages(page_size, capture) if out is None else out"
NEWLY = "Pages(page_size, capture)"
SHARED = mutations(
    "attn_plugin_cuda.kernels.flash",
    {
        "one step per backend": (NEW, f"step = plan.__dict__.setdefault('step', {NEWLY})"),
        "one step per process": (
            NEW, f"step = vars(Kernels).get('step') or setattr(Kernels, 'step', {NEWLY}) or Kernels.step",
        ),
    },
)  # fmt: skip


def make():
    return [cuda_fa3.stand_in()]


@pytest.mark.parametrize("mutation", SHARED, ids=lambda m: m.what)
def test_shared_steps_are_noticed(mutation):
    from attn_core.runtime import Kernels

    check_isolation(PAIRS, make)
    with mutated(mutation), pytest.raises((AssertionError, RuntimeError)):
        check_isolation(PAIRS, make)
    if "step" in vars(Kernels):
        del Kernels.step


def test_waiting_for_the_device_is_noticed():
    old, new = "batch.max_query_len, batch.max_kv_len", "batch.max_query_len, int(batch.kv_lens_device.max())"
    waits = Mutation("a wait in plan", "attn_core.adapters.paged", old, new)
    with mutated(waits), pytest.raises(AssertionError, match="waits"):
        check_two_devices(PAIRS[:1], make)


def test_a_tensor_on_the_wrong_device_is_noticed():
    old, new = "batch.kv_lens_device, table", "batch.kv_lens, table"
    with mutated(Mutation("host lengths", "attn_core.adapters.paged", old, new)), pytest.raises(RuntimeError):
        check_two_devices(PAIRS[:1], make)


def test_fake_devices():
    with devices("cuda") as recorder:
        a = torch.zeros(2, 3, device="cuda:1")
        a[1] = 2
        assert (a.device, (a + 1).device) == (torch.device("cuda:1"), torch.device("cuda:1"))
        assert (a * torch.tensor(2.0)).sum().cpu() == 12
        assert recorder.waits
        recorder.waits.clear()
        with unrecorded():
            assert a[1].tolist() == [2, 2, 2]
        a.view(3, 2)[0] = 5
        assert not recorder.waits
        for other in (torch.ones(2, 3), torch.ones(2, 3, device="cuda:0")):
            with pytest.raises(RuntimeError, match="same device"):
                a + other
        assert a[0, 0].item() == 5
        assert len(recorder.waits) == 1
        assert isinstance(a.new_zeros(4), OnDevice)
    assert torch.zeros(2).device.type == "cpu"
