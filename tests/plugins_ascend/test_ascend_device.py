"""The adapters on a device that is not the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulators import device


@pytest.mark.skipif(device.compiler() is None, reason="no C++ compiler: install g++ or set CXX")
def test_two_devices_at_once():
    script = Path(__file__).with_name("on_npu.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 7
    assert done.stdout.count("replayed") == 3
