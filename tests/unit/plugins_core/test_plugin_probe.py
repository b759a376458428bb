"""Probing: one child process, a time limit, culprits by name, one owner per physical device."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core.errors import BadInputError, PluginError
from attn_core.hookspecs import hookimpl
from attn_core.plugins import Plugins, load_plugins, probe
from attn_core.spec import Device, PlatformSpec, PluginReport
from dists import HEAD, plugin, strangers


def vendor(name: str, body: str, *, specificity: int = 0) -> str:
    """Source of a plugin that drives platform ``name`` and probes with ``body``."""
    return f"""
import os, signal, sys, time, threading
@hookimpl
def attn_platforms():
    return [PlatformSpec(name={name!r}, torch_device="x", specificity={specificity})]
@hookimpl
def attn_probe_devices():
    {body}
    return [Device(platform={name!r}, arch="a1", name={name!r}, versions={{"pid": str(os.getpid())}})]
"""


def load(**kwargs: Any) -> Plugins:
    return load_plugins(environ={}, deny=strangers(), **kwargs)


def report(plugins: Plugins, name: str) -> PluginReport:
    return next(r for r in plugins.reports if r.name == name)


def accelerators(devices: Sequence[Device]) -> list[str]:
    return [d.platform for d in devices if d.platform != "cpu"]


def test_all_probes_share_one_child_whose_noise_stays_there(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = "print('hello'); os.write(1, b'raw hello'); print('oops', file=sys.stderr)"
    plugin(site, "one", vendor("one", noise))
    plugin(site, "two", vendor("two", noise))
    devices = load().probe()
    assert accelerators(devices) == ["one", "two"]
    assert devices[-1].platform == "cpu"
    pids = {d.versions["pid"] for d in devices if d.platform != "cpu"}
    assert len(pids) == 1
    assert str(os.getpid()) not in pids
    assert capfd.readouterr() == ("", "")


def test_a_plugin_without_devices_is_absent_and_one_without_a_probe_is_ok(site: Path) -> None:
    plugin(site, "one", vendor("one", "return []"))
    plugin(site, "rows", "@hookimpl\ndef attn_backends(device):\n    return []\n")
    plugins = load()
    assert accelerators(plugins.probe()) == []
    assert report(plugins, "one").status == "absent"
    assert report(plugins, "rows").status == "ok"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise RuntimeError('driver lost')", "attn_probe_devices: RuntimeError: driver lost"),
        ("sys.exit(4)", "attn_probe_devices: SystemExit: 4"),
        ("return [1]", "attn_probe_devices item 0: DeclarationError: got int, wanted Device"),
        (
            "return [Device(platform='cpu', arch='x')]",
            "attn_probe_devices: BadInputError: reports cpu:x, but declares bad",
        ),
        (
            "return [Device(platform='bad', arch='x')] * 2",
            "attn_probe_devices: BadInputError: reports two devices bad with index 0",
        ),
        ("os._exit(3)", "attn_probe_devices: probe ended its process with exit code 3"),
        ("os._exit(0)", "attn_probe_devices: probe ended its process with exit code 0"),
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "attn_probe_devices: probe killed its process with signal SIGSEGV",
        ),
    ],
)
def test_a_broken_probe_costs_its_own_devices_only(site: Path, body: str, error: str) -> None:
    plugin(site, "bad", vendor("bad", body))
    plugin(site, "good", vendor("good", "pass"))
    plugins = load()
    assert accelerators(plugins.probe()) == ["good"]
    assert (report(plugins, "bad").status, report(plugins, "bad").error) == ("failed", error)
    assert report(plugins, "good").status == "ok"
    assert plugins.probe() == plugins.probe()
    with pytest.raises(PluginError, match="plugin bad"):
        load(strict=True).probe()


def test_a_hanging_probe_is_named_and_everything_it_started_is_gone(site: Path, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    grandchild = (
        "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(started)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    plugin(site, "bad", vendor("bad", grandchild))
    plugin(site, "good", vendor("good", "pass"))
    plugins = load()
    assert accelerators(plugins.probe(timeout=2.5)) == ["good"]
    assert report(plugins, "bad").error == "attn_probe_devices: probe hung for 2.5 s"
    assert not _running(int(started.read_text()))


def _running(pid: int) -> bool:
    for _ in range(50):  # a killed orphan vanishes when init gets to it
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_last_words_and_what_a_probe_leaves_behind(site: Path) -> None:
    """Neither a thread nor an exit handler of a vendor's library outlives the answers."""
    exited = site / "exited"
    left = f"import atexit; atexit.register(open, {str(exited)!r}, 'w'); "
    plugin(site, "bad", vendor("bad", "print('ioctl failed', file=sys.stderr, flush=True); os.abort()"))
    plugin(site, "busy", vendor("busy", left + "threading.Thread(target=time.sleep, args=(1,)).start()"))
    plugins = load()
    assert accelerators(plugins.probe()) == ["busy"]
    assert report(plugins, "bad").hint == "its last words: ioctl failed"
    assert not exited.exists()


def test_a_probe_that_probes_is_not_a_fork_bomb(site: Path) -> None:
    recursive = "from attn_core.plugins import load_plugins; load_plugins(environ={}).probe()"
    plugin(site, "bad", vendor("bad", recursive))
    plugins = load()
    assert accelerators(plugins.probe()) == []
    assert "while it was being probed" in (report(plugins, "bad").error or "")


def test_without_a_child_process_the_cpu_is_still_found(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(site, "one", vendor("one", "pass"))
    monkeypatch.setattr(sys, "executable", str(site / "no-python"))
    plugins = load()
    assert [d.platform for d in plugins.probe()] == ["cpu"]
    assert "the probe process cannot be started" in (report(plugins, "one").error or "")


def test_a_failed_probe_takes_the_rows_from_real_devices_and_leaves_what_if_alone(site: Path) -> None:
    plugin(
        site,
        "bad",
        vendor("bad", "raise RuntimeError('driver lost')")
        + "@hookimpl\ndef attn_backends(device):\n    yield row(device, 'fast', 'decode')\n",
    )
    imagined = Device(platform="bad", arch="a1")
    before = load().catalog(imagined)
    plugins = load()
    (here,) = plugins.probe()
    assert plugins.catalog(imagined) == before
    assert [b.plugin for b in before.devices["bad:a1"].backends if b.plugin != "core"] == ["bad"]
    real = plugins.catalog(here)
    assert not [b for b in real.devices[str(here)].backends if b.plugin == "bad"]
    assert next(r for r in real.reports if r.name == "bad").status == "failed"


def test_objects_that_no_import_can_name_are_probed_in_process() -> None:
    local = ModuleType("local")
    local.attn_platforms = hookimpl(lambda: [PlatformSpec(name="local", torch_device="x")])  # type: ignore[attr-defined]
    local.attn_probe_devices = hookimpl(lambda: [Device(platform="local", arch="a")])  # type: ignore[attr-defined]
    assert accelerators(load(extra=[("local", local)], discovery=False).probe()) == ["local"]


def test_modules_given_by_hand_are_probed_in_the_child(site: Path) -> None:
    (site / "acme_hand.py").write_text(HEAD + vendor("hand", "pass"))
    import acme_hand

    (device,) = (d for d in load(extra=[("hand", acme_hand)], discovery=False).probe() if d.platform == "hand")
    assert device.versions["pid"] != str(os.getpid())


def test_the_child_imports_no_torch(site: Path) -> None:
    plugin(site, "one", vendor("one", "time.sleep(0); assert 'torch' not in sys.modules"))
    assert accelerators(load().probe()) == ["one"]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_time_limits_are_positive_numbers(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_PROBE_TIMEOUT", text)
    with pytest.raises(BadInputError, match=r"number of seconds|must be more than 0"):
        load(discovery=False).probe()


# ---- threads and forks -----------------------------------------------------------------------------------------------


def test_many_threads_make_one_probe(site: Path) -> None:
    plugin(site, "one", vendor("one", "time.sleep(0.2)"))
    plugins = load()
    answers: list[tuple[Device, ...]] = []
    threads = [threading.Thread(target=lambda: answers.append(plugins.probe())) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({a[0].versions["pid"] for a in answers}) == 1
    assert len(answers) == 6


def test_a_forked_child_keeps_the_answer_and_never_waits_for_the_parents_lock(site: Path) -> None:
    """A subprocess, because forking this test process with its threads is no business of ours."""
    plugin(site, "one", vendor("one", "pass"))
    script = f"""
import os, sys
sys.path.insert(0, {str(site)!r})
from attn_core.plugins import load_plugins, probe
done, fresh = (load_plugins(environ={{}}, deny={strangers()}) for _ in range(2))
answer = done.probe()
probe.lock().acquire()  # as if another thread were probing right now
if (child := os.fork()) == 0:
    assert done.probe() is answer
    assert [d.platform for d in fresh.probe()] == ["one", "cpu"]
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 0


# ---- one owner per physical device ----------------------------------------------------------------------------------

PLATFORMS = {
    name: PlatformSpec(name=name, torch_device="x", specificity=s)
    for name, s in (("cuda", 0), ("rocm", 1), ("musa", 0))
}


def device(platform: str, name: str = "", index: int = 0, bus_id: str | None = None) -> Device:
    return Device(platform=platform, arch="a", name=name, index=index, bus_id=bus_id)


def test_the_more_specific_platform_keeps_a_device_two_probes_report() -> None:
    found = {"cuda": (device("cuda", "MI300X"),), "rocm": (device("rocm", "MI300X"),)}
    kept, notes = probe.share_out(found, PLATFORMS)
    assert kept == found["rocm"]
    assert notes == {"cuda": "cuda:a 0 is the same device as rocm:a 0 (MI300X), the more specific platform"}


def test_among_equals_the_first_name_keeps_it() -> None:
    found = {"musa": (device("musa", "S5000"),), "cuda": (device("cuda", "S5000"),)}
    kept, notes = probe.share_out(found, PLATFORMS)
    assert kept == found["cuda"]
    assert "first by name" in notes["musa"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (device("cuda", "X"), device("rocm", "X"), True),
        (device("cuda", "X"), device("rocm", "X", index=1), False),
        (device("cuda", "X"), device("rocm", "Y"), False),
        (device("cuda"), device("rocm"), False),
        (device("cuda", "X"), device("cuda", "X"), False),
        (device("cuda", "A", bus_id="00000000:3B:00.0"), device("rocm", "B", 5, bus_id="0000:3b:00.0"), True),
        (device("cuda", "X", bus_id="0000:3b:00.0"), device("rocm", "X", bus_id="0001:3b:00.0"), False),
        (device("cuda", "X", bus_id="0000:3b:00.0"), device("rocm", "X", bus_id="0000:3c:00.0"), False),
        (device("cuda", "X", bus_id="0000:3b:00.0"), device("rocm", "X"), True),
    ],
)
def test_what_makes_two_reports_one_device(a: Device, b: Device, same: bool) -> None:
    kept, _ = probe.share_out({"a": (a,), "b": (b,)}, PLATFORMS)
    assert len(kept) == (1 if same else 2)


@given(
    st.lists(st.tuples(st.sampled_from(["cuda", "rocm", "musa"]), st.sampled_from("XY"), st.integers(0, 2)), max_size=6)
)
def test_sharing_out_knows_no_order_and_loses_no_device(parts: list[tuple[str, str, int]]) -> None:
    found: dict[str, tuple[Device, ...]] = {}
    for platform, name, index in dict.fromkeys(parts):
        if index not in {d.index for d in found.get(platform, ())}:
            found[platform] = (*found.get(platform, ()), device(platform, name, index))
    kept = [probe.share_out(dict(order), PLATFORMS)[0] for order in permutations(found.items())]
    assert all(k == kept[0] for k in kept)
    everything = {(d.name, d.index) for devices in found.values() for d in devices}
    assert {(d.name, d.index) for d in kept[0]} == everything
    assert len(kept[0]) == len(everything)


def test_losing_every_device_is_absence_and_says_why(site: Path) -> None:
    both = "return [Device(platform=NAME, arch='a1', bus_id='0000:3b:00.0')]"
    plugin(site, "tools", vendor("tools", both.replace("NAME", "'tools'")))
    plugin(site, "vendor", vendor("vendor", both.replace("NAME", "'vendor'"), specificity=1))
    plugins = load()
    assert accelerators(plugins.probe()) == ["vendor"]
    assert (report(plugins, "tools").status, report(plugins, "vendor").status) == ("absent", "ok")
    assert "same device as vendor:a1 0" in report(plugins, "tools").hint
