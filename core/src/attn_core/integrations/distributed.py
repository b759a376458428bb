"""One decision for all ranks of a process group of torch.distributed.

    from attn_core.integrations import distributed

    agreed = distributed.agree(model, tensor_parallel=8)      # on every rank; agreed.decision is this rank's
    attn = distributed.attention_backend(model, rank=tp_rank) # the same, and bound

Ranks talk through the group's key-value store, not through its collectives: that needs no gloo beside NCCL or HCCL, and
whoever is missing after ``timeout`` can be named. What travels is JSON text, never pickled objects. The lowest rank of
the group decides; every rank checks that it holds what the others hold. Every rank of the group must make the same
calls in the same order, as with any collective.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from attn_core import fleet
from attn_core.errors import AttnCoreError, BadInputError, BindError, MissingKernelError, NoBackendError
from attn_core.fleet import FleetDecision, FleetError, Ranks
from attn_core.fleet.agree import heard
from attn_core.platform import Platform, get_platform
from attn_core.resolve.refuse_joint import RankRejection
from attn_core.runtime import AttentionBackend
from attn_core.spec import Decision

TIMEOUT = 60.0
"""Seconds that ranks wait for each other."""
_GRACE = 5.0
"""Seconds more that the others wait for the rank that waits for all."""

_EARLY = 0.2
"""A wait that ends this much before its time did not time out: the store is gone."""
_calls: dict[tuple[int, ...], int] = {}
"""Group -> calls so far; every rank counts alike, so each call has keys of its own."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks hold, and this rank's part of it."""

    fleet: FleetDecision
    rank: int
    """Global rank of this process."""

    @property
    def decision(self) -> Decision:
        """This rank's."""
        return self.fleet.decision_of(self.rank)


def agree(
    model: Any,
    group: dist.ProcessGroup | None = None,
    *,
    platform: Platform | None = None,
    device: int = 0,
    roles: Collection[str] | None = None,
    timeout: float = TIMEOUT,
    tolerate: bool = False,
    store: Store | None = None,
    **options: Any,
) -> Agreement:
    """Decide together with all ranks of ``group`` (None: all ranks). A collective call.

    ``model`` and ``options`` as for :meth:`Platform.resolve`, the same on every rank. ``device`` indexes this rank's
    ``platform.devices``; ``roles``: what this rank runs of ``prefill``, ``decode``, ``encode``. ``tolerate`` as for
    :func:`attn_core.fleet.decide`. ``store``: any store that all ranks reach; None takes the default group's.

    Raises, with the same text on every rank: :class:`FleetError` naming ranks that failed, are missing after
    ``timeout`` seconds, have other plugins, packages, another model or another attn-core; :class:`NoBackendError`
    naming the ranks that stand in the way.
    """
    line = _Line(group, store, timeout)
    return _agree(line, model, platform, device, roles, tolerate, {}, options)


def attention_backend(
    model: Any,
    group: dist.ProcessGroup | None = None,
    *,
    rank: int = 0,
    platform: Platform | None = None,
    device: int = 0,
    roles: Collection[str] | None = None,
    timeout: float = TIMEOUT,
    tolerate: bool = False,
    store: Store | None = None,
    **options: Any,
) -> AttentionBackend:
    """:func:`agree`, then bind this rank's part on its device. A collective call; ``rank`` is the tensor-parallel rank.

    A kernel that turns out to be missing on one rank makes all ranks decide again, knowing that this rank lacks it.
    Raises as :func:`agree` does, and :class:`FleetError` on every rank when one cannot bind for another reason.
    """
    from attn_core.runtime.backend import bind_decision

    line, unusable = _Line(group, store, timeout), dict[str, str]()
    while True:
        agreed = _agree(line, model, platform, device, roles, tolerate, unusable, options)
        bound, state = None, ""
        cause: Exception | None = None
        try:
            here = platform or get_platform()
            if here.simulated:
                raise BindError(f"{here.device} is simulated: decisions can be explained, kernels cannot be bound")
            bound = bind_decision(agreed.decision, here.torch_device(device), rank=rank)
        except MissingKernelError as e:
            if e.bind is None or e.bind in unusable:
                cause, state = e, f"{type(e).__name__}: {e}"
            else:
                unusable[e.bind], state = str(e), _AGAIN
        except Exception as e:  # whatever it is, the others wait for a word from here
            cause, state = e, f"{type(e).__name__}: {e}"
        states = json.loads(line.round("bound", state, _not_bound))
        failed = {int(r): s for r, s in states.items() if s != _AGAIN}
        if failed:
            lines = (f"rank {r} cannot bind: {s}" for r, s in failed.items())
            raise FleetError("; ".join(lines), list(failed)) from cause
        if bound is not None and not states:
            return bound


_AGAIN = "again"
"""A kernel is missing that nobody knew of; not a failure yet."""


def _not_bound(states: Mapping[int, str]) -> str:
    return json.dumps({r: s for r, s in states.items() if s})


def _agree(
    line: _Line,
    model: Any,
    platform: Platform | None,
    device: int,
    roles: Collection[str] | None,
    tolerate: bool,
    unusable: Mapping[str, str],
    options: Mapping[str, Any],
) -> Agreement:
    failed = None
    try:
        said = fleet.describe(model, platform=platform, device=device, roles=roles, **options)
        said["unusable"] = {**said["unusable"], **unusable}
    except Exception as e:  # whatever it is, the others wait for a word from here
        failed, said = e, fleet.failure(e)

    def judge(all_said: Mapping[int, str]) -> str:
        texts, ranks = [*all_said.values()], [*all_said]
        plugins = None if platform is None else platform.plugins
        try:
            heard(texts, ranks)  # before this rank's own model is looked at, which may be what failed
            decided = fleet.decide(texts, model, ranks=ranks, plugins=plugins, tolerate=tolerate, **options)
        except Exception as e:
            return json.dumps({"error": _error_to_json(e, line.leader)})
        return json.dumps({"decided": decided.to_json()})

    answer = json.loads(line.round("said", json.dumps(said, sort_keys=True), judge))
    if "error" in answer:
        raise _error_from_json(answer["error"]) from failed
    decided = FleetDecision.from_json(answer["decided"])
    line.check_equal("held", decided.digest)
    return Agreement(fleet=decided, rank=line.rank)


def _error_to_json(e: Exception, leader: int) -> dict[str, Any]:
    if isinstance(e, NoBackendError):
        rejections = [r.to_json() for r in e.rejections]
        return {"code": e.code, "text": e.text, "rejections": rejections, "relaxations": list(e.relaxations)}
    if isinstance(e, FleetError):
        return {"code": "fleet", "text": str(e), "ranks": list(e.ranks)}
    if isinstance(e, BadInputError):
        return {"code": "bad_input", "text": str(e)}
    return {"code": "fleet", "text": f"rank {leader} failed to decide: {type(e).__name__}: {e}", "ranks": [leader]}


def _error_from_json(data: Mapping[str, Any]) -> AttnCoreError:
    if data["code"] == "fleet":
        return FleetError(data["text"], data["ranks"])
    if data["code"] == "bad_input":
        return BadInputError(data["text"])
    rejections = [RankRejection.from_json(r) for r in data["rejections"]]
    return NoBackendError(data["code"], data["text"], rejections, data["relaxations"])


class _Line:
    """The ranks of a group, talking through a store: everybody says something, the lowest rank answers all."""

    def __init__(self, group: dist.ProcessGroup | None, store: Store | None, timeout: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise BadInputError(
                "torch.distributed is not initialised here: call init_process_group first, or use attn_core.fleet "
                "with a transport of your own"
            )
        if not timeout > 0:
            raise BadInputError(f"timeout={timeout!r} must be a positive number of seconds")
        self.rank = dist.get_rank()
        self.ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        if self.rank not in self.ranks:
            raise BadInputError(f"rank {self.rank} is not in the group, whose members are {Ranks.of(self.ranks)}")
        self.leader, self.timeout = self.ranks[0], timeout
        call = _calls[self.ranks] = _calls.get(self.ranks, 0) + 1
        members = zlib.crc32(json.dumps(self.ranks).encode())
        whole = _get_default_store() if store is None else store
        self.store = PrefixStore(f"attn_core/{members:08x}/{call}", whole)
        self._rounds = 0

    def round(self, what: str, mine: str, judge: Callable[[Mapping[int, str]], str]) -> str:
        """Everybody says ``mine``; the answer of the leader's ``judge`` to all of it. Raises :class:`FleetError` naming
        who is missing."""
        self._rounds += 1
        key = f"{self._rounds}/{what}"
        self._set(f"{key}/{self.rank}", mine)
        if self.rank == self.leader:
            keys = {r: f"{key}/{r}" for r in self.ranks}
            missing = self._missing(keys, self.timeout)
            verdict: dict[str, Any] = {"missing": missing}
            if not missing:
                verdict = {"answer": judge({r: self._get(k) for r, k in keys.items()})}
            self._set(f"{key}/answer", json.dumps(verdict))
        else:
            wait = self.timeout + _GRACE
            if self._missing({self.leader: f"{key}/answer"}, wait):
                silent = [r for r in self.ranks if not self._ask(self.store.check, [f"{key}/{r}"])]
                raise self._silent(silent or [self.leader], wait)
            verdict = json.loads(self._get(f"{key}/answer"))
        if missing := list(verdict.get("missing", ())):
            raise self._silent(missing, self.timeout)
        return str(verdict["answer"])

    def _silent(self, missing: list[int], seconds: float) -> FleetError:
        return FleetError(
            f"{Ranks.of(missing)} did not answer within {seconds:g} s (dead, or not in this call); "
            f"{len(self.ranks) - len(missing)} of {len(self.ranks)} ranks did",
            missing,
        )

    def check_equal(self, what: str, mine: str) -> None:
        """Raise :class:`FleetError` on every rank unless all hold the same text."""
        verdict = json.loads(self.round(what, mine, self._differing))
        if verdict:
            raise FleetError(
                f"what {Ranks.of(verdict)} received is not what rank {self.leader} decided; the store changed it",
                verdict,
            )

    def _differing(self, held: Mapping[int, str]) -> str:
        return json.dumps([r for r, text in held.items() if text != held[self.leader]])

    def _missing(self, keys: Mapping[int, str], timeout: float) -> list[int]:
        """Ranks whose key is not there when the time is over."""
        until = time.monotonic() + timeout
        try:
            self.store.wait([*keys.values()], timedelta(seconds=timeout))
        except dist.DistError as e:
            if time.monotonic() < until - _EARLY:
                raise self._gone() from e
            return [r for r, k in keys.items() if not self._ask(self.store.check, [k])]
        return []

    def _set(self, key: str, text: str) -> None:
        self._ask(self.store.set, key, zlib.compress(text.encode()))

    def _get(self, key: str) -> str:
        return zlib.decompress(self._ask(self.store.get, key)).decode()

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except dist.DistError as e:
            raise self._gone() from e

    def _gone(self) -> FleetError:
        return FleetError(
            "the store of the process group does not answer: the process that hosts it, usually rank 0, has died", [0]
        )


__all__ = ["TIMEOUT", "Agreement", "agree", "attention_backend"]
