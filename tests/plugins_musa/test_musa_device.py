"""The adapters on a device that is not the host, where MATE allocates on the current device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulators import device

SCRIPT = Path(__file__).with_name("on_musa.py")


def run(*before: str) -> subprocess.CompletedProcess[str]:
    code = f"{'; '.join([*before, ''])}import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(device.compiler() is None, reason="no C++ compiler: install g++ or set CXX")
def test_two_devices_at_once():
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 5


@pytest.mark.skipif(device.compiler() is None, reason="no C++ compiler: install g++ or set CXX")
def test_metadata_on_the_current_device_would_be_noticed():
    done = run(
        "import contextlib, attn_plugin_musa.kernels.current as c", "c.current = lambda d: contextlib.nullcontext"
    )
    assert done.returncode != 0
    assert "scheduler_metadata is on musa:0, q on musa:1" in done.stderr
