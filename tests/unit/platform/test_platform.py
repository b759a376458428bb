"""The platform object: found once, safe under threads and after fork; simulated ones explain and refuse to bind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from attn_core import (
    ANY,
    AttnCoreError,
    BackendSpec,
    BadInputError,
    BindError,
    Device,
    MissingKernelError,
    ModelSpec,
    NoBackendError,
    get_platform,
    hookimpl,
    simulate,
)
from attn_core import platform as platform_module
from attn_core.platform import Platform
from attn_core.plugins import load_plugins
from attn_core.plugins.registry import Plugins

FIELDS = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32"}


@pytest.fixture
def fresh(monkeypatch):
    """A process that has asked for no platform yet."""
    monkeypatch.setattr(platform_module, "_plugins", None)
    monkeypatch.setattr(platform_module, "_platforms", {})


def test_the_same_object_every_time():
    assert get_platform() is get_platform()
    assert get_platform("cpu") is get_platform("cpu")


def test_many_threads_probe_once(fresh, monkeypatch):
    probes = []
    real = Plugins.probe

    def slow(self, timeout=None):
        probes.append(threading.get_ident())
        time.sleep(0.05)
        return real(self, timeout)

    monkeypatch.setattr(Plugins, "probe", slow)
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        found.append(get_platform())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(probes) == 1
    assert len({id(p) for p in found}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_keeps_the_answer_and_does_not_deadlock():
    """Forked while another thread holds the lock: the child must neither hang nor probe again."""
    script = """
import os, threading, time
from attn_core import get_platform
from attn_core import platform as p
from attn_core.plugins.registry import Plugins
parent = get_platform()
Plugins.probe = lambda self, timeout=None: (_ for _ in ()).throw(SystemExit(9))
held = threading.Event()
def hold():
    with p._lock:
        held.set()
        time.sleep(1)
threading.Thread(target=hold, daemon=True).start()
held.wait()
pid = os.fork()
if pid == 0:
    same = get_platform() is parent
    with p._lock:
        os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "0"


def test_the_environment_names_the_platform(fresh, monkeypatch):
    monkeypatch.setenv("ATTN_CORE_PLATFORM", "cpu")
    assert get_platform().name == "cpu"
    monkeypatch.setattr(platform_module, "_platforms", {})
    monkeypatch.setenv("ATTN_CORE_PLATFORM", "nonesuch")
    with pytest.raises(BadInputError, match=r"platform 'nonesuch' has no device here; found: .*cpu"):
        get_platform()


def test_asking_for_a_platform_that_is_absent(fresh):
    with pytest.raises(BadInputError, match="has no device here"):
        get_platform("tpu")
    assert get_platform().devices  # the failed question broke nothing


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cpu:avx1024", "did you mean 'avx512'"),
        ("gpu:sm_90", "no installed plugin describes platform 'gpu'"),
        ("cpu", "cpu knows"),
        ("", "unknown device ''"),
        ("cpu:avx2:0", "unknown device"),
    ],
)
def test_unknown_devices_are_bad_input(device, says):
    with pytest.raises(BadInputError) as e:
        simulate(device)
    assert says in str(e.value)


def test_a_simulated_device_explains_and_refuses_to_bind():
    there = simulate("cpu:amx_bf16")
    decision = there.resolve(**FIELDS)
    assert decision.device.arch == "amx_bf16"
    assert decision.explain().startswith("model on cpu:amx_bf16")
    with pytest.raises(BindError, match="simulated"):
        there.attention_backend(**FIELDS)
    with pytest.raises(AttnCoreError, match="simulated"):
        there.synchronize()


def test_products_keep_their_name():
    assert simulate("cpu:genoa").device.name == "genoa"
    assert simulate("CPU:Genoa").device.arch == "avx512_bf16"


def test_fields_and_options_are_told_apart():
    decision = get_platform("cpu").resolve(**FIELDS, page_size=32, sliding_window=128)
    assert decision.values["page_size"] == 32
    assert decision.model.groups["full"].sliding_window == 128
    with pytest.raises(BadInputError, match="head_dim is a field of the model"):
        get_platform("cpu").resolve(ModelSpec.of(**FIELDS), head_dim=32)
    with pytest.raises(BadInputError, match="unknown option 'pagesize'; did you mean 'page_size'"):
        get_platform("cpu").resolve(**FIELDS, pagesize=16)


def test_runtime_services_on_the_cpu():
    cpu = get_platform("cpu")
    cpu.set_device(0)
    cpu.synchronize()
    cpu.empty_cache()
    free, total = cpu.memory_info()
    assert 0 < free <= total
    assert cpu.torch_device() == "cpu"
    assert cpu.dist_backend == "gloo"
    assert "float32" in cpu.supported_dtypes
    assert cpu.fp8_dtype == "float8_e4m3fn"
    with pytest.raises(AttnCoreError, match="cpu has no graphs"):
        cpu.graph()


def test_one_log_line_per_decision(caplog):
    caplog.set_level("INFO", logger="attn_core")
    decision = get_platform("cpu").resolve(**FIELDS)
    lines = [r for r in caplog.records if r.levelname == "INFO"]
    assert len(lines) == 1
    assert decision.digest in lines[0].getMessage()


class Fragile:
    """A plugin whose best kernel turns out to be missing when it is bound."""

    @staticmethod
    @hookimpl
    def attn_backends(device):
        for role in ("prefill", "decode"):
            accepts = {"dtype": ANY, "head_dim": ANY, "graph": ["none"]}
            yield BackendSpec(
                backend="fragile", role=role, platform=device.platform, tier="BEST", accepts=accepts,
                bind=f"{__name__}:missing",
            )  # fmt: skip


def missing(binding):
    raise MissingKernelError("libfragile.so: undefined symbol")


@pytest.fixture
def fragile():
    plugins = load_plugins(extra=[("fragile", Fragile)], discovery=False)
    devices = plugins.probe()
    return Platform(plugins.platforms()["cpu"], devices, plugins)


def test_a_kernel_missing_at_bind_is_a_rejection_and_the_next_one_serves(fragile):
    assert fragile.resolve(**FIELDS).backend("decode") == "fragile"
    attn = fragile.attention_backend(**FIELDS)
    assert attn.decision.backend("decode") == "torch_native"
    why = [r for r in attn.decision.rejections if r.backend == "fragile"]
    assert {r.code for r in why} == {"package"}
    assert "libfragile.so" in attn.decision.explain()
    with pytest.raises(NoBackendError, match="libfragile"):
        fragile.attention_backend(**FIELDS, backend="fragile")


def test_decisions_of_equal_questions_are_equal_in_every_process():
    """Hash seeds change nothing: two processes print the same bytes."""
    script = (
        "from attn_core import simulate;"
        "print(simulate('cpu:avx2').resolve(num_heads=8, head_dim=64, dtype='float16', sinks=True).dumps())"
    )
    outs = set()
    for seed in ("0", "1", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        outs.add(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    assert len(outs) == 1
    assert json.loads(outs.pop())["schema"] == 1


def test_devices_are_data():
    platform = get_platform("cpu")
    assert all(isinstance(d, Device) for d in platform.devices)
    assert platform.device.isa
