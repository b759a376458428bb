"""Which devices are here: all probes in one child process with a time limit, answers as data.

A vendor's library may hang, crash, print, or leave a driver context behind; a child process takes all of that with it.
If the child dies or hangs, the plugins that had not answered are asked again one by one, which names the culprit and
saves the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from attn_core.errors import BadInputError, PluginError
from attn_core.plugins.guard import ContainedError, guard
from attn_core.plugins.validate import check_item
from attn_core.spec import Device, PlatformSpec

if TYPE_CHECKING:
    from attn_core.plugins.registry import Active

TIMEOUT, IN_PROBE = "ATTN_CORE_PROBE_TIMEOUT", "ATTN_CORE_IN_PROBE"
DEFAULT_TIMEOUT = 10.0
_HOOK = "attn_probe_devices"
_CHILD = Path(__file__).with_name("_probe_child.py")

Answer = tuple[Device, ...] | ContainedError

_lock = threading.Lock()


def lock() -> threading.Lock:
    """Held while probing, so that many threads make one probe."""
    return _lock


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held the parent's when this process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Probed:
    """What probing gave: devices in order, and how the plugins that probe fared."""

    devices: tuple[Device, ...]
    failures: Mapping[str, ContainedError] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    """Plugins whose hardware is not here."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Plugin -> devices of its that a more specific platform keeps."""


def probe(plugins: Sequence[Active], timeout: float | None = None) -> Probed:
    """Ask every plugin that has a probe, check the answers, and give each physical device to one platform."""
    if IN_PROBE in os.environ:
        raise PluginError("a plugin asked for the devices of this machine while it was being probed for them")
    seconds = _seconds(timeout)
    able = [a for a in plugins if _HOOK in a.hooks.names]
    answers = _ask_child({a.name: a.reference for a in able if a.reference is not None}, seconds)
    for a in able:
        if a.reference is None:
            try:
                answers[a.name] = tuple(a.hooks.collect(_HOOK, Device))
            except ContainedError as e:
                answers[a.name] = e
    good: dict[str, tuple[Device, ...]] = {}
    failures: dict[str, ContainedError] = {}
    for a in able:
        try:
            answer = answers[a.name]
            if isinstance(answer, ContainedError):
                raise answer
            with guard(_HOOK):
                _check_own(answer, {p.name for p in a.platforms})
            good[a.name] = answer
        except ContainedError as e:
            failures[a.name] = e
    specs = {p.name: p for a in plugins for p in a.platforms}
    kept, notes = share_out(good, specs)
    absent = frozenset(name for name, devices in good.items() if not set(map(id, devices)) & set(map(id, kept)))
    return Probed(kept, failures, absent, notes)


def _seconds(timeout: float | None) -> float:
    text = os.environ.get(TIMEOUT, "").strip()
    try:
        seconds = float(text or DEFAULT_TIMEOUT) if timeout is None else float(timeout)
    except ValueError:
        raise BadInputError(f"{TIMEOUT}={text!r} is not a number of seconds") from None
    if not 0 < seconds < 86400:
        raise BadInputError(f"probe timeout {seconds:g} s must be more than 0 and less than a day")
    return seconds


def _check_own(devices: Iterable[Device], platforms: set[str]) -> None:
    seen: set[tuple[str, int]] = set()
    for d in devices:
        if d.platform not in platforms:
            raise BadInputError(f"reports {d}, but declares {', '.join(sorted(platforms)) or 'no platform'}")
        if (d.platform, d.index) in seen:
            raise BadInputError(f"reports two devices {d.platform} with index {d.index}")
        seen.add((d.platform, d.index))


def share_out(
    found: Mapping[str, tuple[Device, ...]], platforms: Mapping[str, PlatformSpec]
) -> tuple[tuple[Device, ...], Mapping[str, str]]:
    """One owner per physical device: the more specific platform (CUDA tools also answer on ROCm), then the first name.

    Returns the devices kept, most specific platform first, and a note per plugin that had to yield.
    """
    order = sorted(
        ((d, plugin) for plugin, devices in found.items() for d in devices),
        key=lambda x: (-platforms[x[0].platform].specificity, x[0].platform, x[0].index),
    )
    kept: list[Device] = []
    notes: dict[str, str] = {}
    for d, plugin in order:
        owner = next((k for k in kept if _same(k, d)), None)
        if owner is None:
            kept.append(d)
            continue
        more = platforms[owner.platform].specificity > platforms[d.platform].specificity
        why = "the more specific platform" if more else "first by name among equally specific platforms"
        note = f"{d} {d.index} is the same device as {owner} {owner.index} ({owner.name}), {why}"
        notes[plugin] = f"{notes[plugin]}; {note}" if plugin in notes else note
    return tuple(kept), notes


def _same(a: Device, b: Device) -> bool:
    """Whether two platforms mean one device: by bus address, or by name and index where one does not know it."""
    if a.platform == b.platform:
        return False
    if a.bus_id and b.bus_id:
        return _bus(a.bus_id) == _bus(b.bus_id)
    return bool(a.name) and (a.name, a.index) == (b.name, b.index)


def _bus(address: str) -> str:
    """``00000000:3B:00.0`` (NVML) and ``0000:3b:00.0`` (sysfs) are one address."""
    domain, _, rest = address.strip().lower().rpartition(":")[0].partition(":")
    return f"{domain.lstrip('0')}:{rest}:{address.strip().lower().rpartition(':')[2]}"


def _ask_child(references: Mapping[str, str], seconds: float) -> dict[str, Answer]:
    """Probe plugins (name -> where to import them) in one child; those it left without an answer again, each alone."""
    if not references:
        return {}
    answers, ending = _run_child(references, seconds)
    left = {n: references[n] for n in sorted(references) if n not in answers}
    if len(references) == 1:
        answers.update((n, ending) for n in left)
    else:
        for n in left:
            answers.update(_ask_child({n: left[n]}, seconds))
    return answers


def _run_child(references: Mapping[str, str], seconds: float) -> tuple[dict[str, Answer], ContainedError]:
    """Answers of one child process, and how it ended as a reason against those that did not answer.

    It talks through files: a pipe stays open for as long as anything a probe started lives.
    """
    request = {"path": [p for p in sys.path if isinstance(p, str)], "plugins": dict(sorted(references.items()))}
    try:
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as noise:
            asked.write(json.dumps(request).encode())
            asked.seek(0)
            ending = _wait(
                subprocess.Popen(
                    [sys.executable, str(_CHILD)], stdin=asked, stdout=said, stderr=noise,
                    env={**os.environ, IN_PROBE: "1"}, start_new_session=True,
                ),
                seconds,
            )  # fmt: skip
            return _read_answers(said), ContainedError(f"{_HOOK}: {ending}", _last_words(noise))
    except OSError as e:
        why = ContainedError(
            f"{_HOOK}: the probe process cannot be started: {e}", "only the CPU can be found without it"
        )
        return dict.fromkeys(references, why), why


def _wait(child: subprocess.Popen[bytes], seconds: float) -> str:
    """How the child ended. One that is stuck in a driver survives even a kill; it is left behind, not waited for."""
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"probe hung for {seconds:g} s"
    finally:
        if child.poll() is None:
            with suppress(OSError):
                _kill_group(child)
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
    if code >= 0:
        return f"probe ended its process with exit code {code}"
    try:
        return f"probe killed its process with signal {signal.Signals(-code).name}"
    except ValueError:
        return f"probe killed its process with signal {-code}"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        child.kill()
    else:
        os.killpg(child.pid, signal.SIGKILL)  # with whatever the probe itself had started


def _read_answers(said: IO[bytes]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    said.seek(0)
    for line in said.read().splitlines():
        try:
            data = json.loads(line)
            name = data["plugin"]
            if "error" in data:
                answers[name] = ContainedError(data["error"], data["hint"])
            else:
                devices = tuple(Device.from_json(d) for d in data["devices"])
                for d in devices:
                    check_item(d, Device)
                answers[name] = devices
        except (ValueError, TypeError, KeyError):  # cut short by the death of the child: no answer
            continue
    return answers


def _last_words(noise: IO[bytes]) -> str:
    noise.seek(max(0, noise.seek(0, os.SEEK_END) - 2000))
    lines = noise.read().decode(errors="replace").strip().splitlines()
    return f"its last words: {lines[-1].strip()[:200]}" if lines else ""
