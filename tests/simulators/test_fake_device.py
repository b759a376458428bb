"""The stand-in for a vendor's device behaves like a device. In a process of its own: a process has one such name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulators import device

CHECKS = """
import torch
from simulators import device

musa = device.install("musa")
assert device.install("musa") is musa and torch.musa is musa

# tensors say where they are, and keep saying it
there = torch.ones(2, 3, device="musa:1")
for made in (torch.empty(2, 3, device="musa:1"), torch.zeros(6, device="musa:1").view(2, 3), there + 1, there.T[1:],
             torch.arange(32, device="musa:1").view(4, 8), torch.randn(4).to("musa:1"), there.clone(),
             torch.ones(3).musa().to("musa:1")):
    assert made.device == torch.device("musa:1") and made.is_musa, made.device
assert torch.empty(1, device="musa").device.index == 0

# values are right: products, gathers through a page table, views written in place
x = torch.randn(4, 8)
d = x.to("musa")
assert torch.equal((d @ d.T).cpu(), x @ x.T)
pages = torch.randn(5, 16, 2, 8)
table = torch.tensor([3, 1])
assert torch.equal(pages.to("musa")[table.to("musa")].cpu(), pages[table])
cache = torch.zeros(4, 16, 2, 8, device="musa")
address = cache.data_ptr()
cache.view(-1, 2, 8)[torch.tensor([3, 21], device="musa")] = 1.0
cache.transpose(1, 2)[2].fill_(2.0)
assert cache.sum().item() == 2 * 16 + 2 * 256 and cache.data_ptr() == address
rows = torch.zeros(2, 3, 6, device="musa")  # a view with gaps, written through
rows[..., :4].index_put_((torch.tensor([1], device="musa"), torch.tensor([2], device="musa")), torch.ones(1, 4).musa())
assert rows.sum().item() == rows[1, 2, :4].sum().item() == 4
out = torch.empty(4, 4, device="musa")
torch.mm(d, d.T, out=out)
assert torch.equal(out.cpu(), x @ x.T)

# what needs no new memory gets none, what does is counted
before = musa.allocations
cache[0].copy_(cache[1]); cache[0].view(-1)
assert musa.allocations == before
torch.empty(3, device="musa")
assert musa.allocations == before + 1

# mixing devices fails, as on hardware
for other in (torch.ones(4, 8), torch.ones(4, 8, device="musa:1")):
    try:
        d + other
    except RuntimeError as e:
        assert "same device" in str(e)
    else:
        raise SystemExit(f"musa:0 + {other.device} went through")

# streams and events exist; torch.accelerator knows the device
stream, event = torch.Stream(device="musa"), torch.Event(device="musa")
with stream:
    event.record(stream)
    assert torch.accelerator.current_stream().stream_id == stream.stream_id
assert torch.accelerator.current_stream().stream_id != stream.stream_id
event.synchronize()
assert torch.accelerator.current_accelerator().type == "musa" and torch.accelerator.device_count() == 2
with torch.device("musa:1"):
    assert torch.empty(2).device.index == 1

try:
    device.install("npu")
except RuntimeError as e:
    assert "already been set" in str(e)
else:
    raise SystemExit("a second name was accepted")
print("done")
"""


@pytest.mark.skipif(device.compiler() is None, reason="no C++ compiler: install g++ or set CXX")
def test_the_device_behaves_like_one():
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHECKS], cwd=tests, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "done"
