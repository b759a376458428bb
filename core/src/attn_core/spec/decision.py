"""What came out: choices, values, why, what was refused, and which plugins spoke. JSON in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from attn_core.spec.backend import Tier
from attn_core.spec.device import Device
from attn_core.spec.model import ModelSpec
from attn_core.spec.options import EngineOptions

SCHEMA = 1

RejectionCode = Literal["isa", "feature", "value", "pin", "denied", "package", "version", "conflict"]

_TEXT = {
    "isa": "needs {allowed}, which {got} does not have",
    "feature": "does not support {field}={got}",
    "value": "{field}={got} is not accepted; accepted: {allowed}",
    "pin": "you pinned {field}={got}; accepted: {allowed}",
    "denied": "denied by the engine's options",
    "package": "{got} is not installed",
    "version": "{field} {got} is installed, needs {allowed}",
    "conflict": "{field}: {got}; {allowed}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """One reason against one backend in one role of one group. Data; ``text`` is printed from it."""

    code: RejectionCode
    backend: str
    role: str
    group: str
    field: str
    got: Any
    allowed: Any
    plugin: str
    hint: str = ""
    row: int = 0
    """Which of the backend's rows for that role, in content order; a backend may make several promises."""

    @property
    def text(self) -> str:
        """One sentence without the backend's name."""
        allowed = self.allowed
        if self.code == "package" and self.field == "kernel":
            return f"its kernel could not be bound: {self.got}"
        if isinstance(allowed, list | tuple):
            allowed = ", ".join(map(_word, allowed)) or "nothing"
        return _TEXT[self.code].format(field=self.field, got=_word(self.got), allowed=_word(allowed))

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code, "backend": self.backend, "role": self.role, "group": self.group, "field": self.field,
            "got": _jsonable(self.got), "allowed": _jsonable(self.allowed), "plugin": self.plugin, "hint": self.hint,
            "row": self.row, "text": self.text,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rejection:
        tuples = {k: _tupled(data[k]) for k in ("got", "allowed")}
        return cls(**{**{k: v for k, v in data.items() if k != "text"}, **tuples})


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {_word(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "/".join(map(_word, value))
    return "none" if value is None else str(value)


def _jsonable(value: Any) -> Any:
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value


PluginStatus = Literal["ok", "absent", "blocked", "incompatible", "failed"]


@dataclass(frozen=True, kw_only=True)
class PluginReport:
    """How one plugin fared. ``error`` names the hook and the exception; ``hint`` what to do."""

    name: str
    dist: str = ""
    version: str = ""
    status: PluginStatus = "ok"
    error: str | None = None
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "dist": self.dist, "version": self.version, "status": self.status,
            "error": self.error, "hint": self.hint,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend chosen for one role of one group, with what its kernel sees."""

    backend: str
    plugin: str
    platform: str
    tier: Tier
    rank: int = 0
    form: str | None = None
    head_dim: int | None = None
    """Width of q and k in the kernel; None for roles without heads."""
    padded_from: int | None = None
    """The model's width where the kernel's is larger."""
    num_heads: int | None = None
    """Query heads in the kernel, on one rank."""
    unified: bool = False
    claims: frozenset[str] = frozenset()
    variants: Mapping[str, str] = field(default_factory=dict)
    bind: str | None = None
    evidence: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend, "plugin": self.plugin, "platform": self.platform, "tier": self.tier.name,
            "rank": self.rank, "form": self.form, "head_dim": self.head_dim, "padded_from": self.padded_from,
            "num_heads": self.num_heads, "unified": self.unified, "claims": sorted(self.claims),
            "variants": dict(self.variants), "bind": self.bind, "evidence": self.evidence,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        return cls(**{**data, "tier": Tier[data["tier"]], "claims": frozenset(data["claims"])})


@dataclass(frozen=True, kw_only=True)
class GroupDecision:
    """Backends per role of one group, and the values settled for that group alone."""

    choices: Mapping[str, Choice]
    values: Mapping[str, Any]
    """``head_dim`` (kernel width), ``kv_layout``, ``mla_query``, ``scale``; only those that apply."""

    def to_json(self) -> dict[str, Any]:
        return {**{role: c.to_json() for role, c in self.choices.items()}, "values": dict(self.values)}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One resolved, explained decision. Equal inputs give equal decisions, whatever the order plugins loaded in.

    ``digest`` covers what was asked and what was chosen; it leaves out rejections, reports and explanations, so that a
    broken foreign plugin changes no digest.
    """

    devices: Mapping[str, Device]
    """Role -> device; the key ``""`` alone when one device serves all roles."""
    model: ModelSpec
    options: EngineOptions
    groups: Mapping[str, GroupDecision]
    roles: Mapping[str, Choice]
    """Roles of the whole model: ``allreduce_fusion``."""
    values: Mapping[str, Any]
    """Shared values: ``page_size``, ``kv_cache_dtype``, ``kv_layout`` (when all groups agree), ``graph``."""
    because: Mapping[str, tuple[str, ...]]
    """Value name, or ``group.value`` for a group's own -> reasons."""
    eligible: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """``group.role`` -> the other backends that could have served, best first."""
    rejections: Sequence[Rejection] = ()
    plugins: tuple[PluginReport, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package and toolkit versions the decision rests on."""

    @property
    def device(self) -> Device:
        """The device, or the one that decodes when roles run on several."""
        return (
            self.devices.get("", next(iter(self.devices.values())))
            if "decode" not in self.devices
            else self.devices["decode"]
        )

    def device_of(self, role: str) -> Device:
        return self.devices.get(role) or self.device

    def backend(self, role: str, group: str | None = None) -> str:
        """Name of the backend chosen for a role, of the only group unless one is named."""
        if role in self.roles:
            return self.roles[role].backend
        return self.groups[group if group is not None else next(iter(self.groups))].choices[role].backend

    def _body(self) -> dict[str, Any]:
        one = self.devices.get("")
        where = {"device": one.to_json()} if one else {"devices": {r: d.to_json() for r, d in self.devices.items()}}
        return {
            "schema": SCHEMA,
            **where,
            "model": self.model.to_json(),
            "options": self.options.to_json(),
            "groups": {n: g.to_json() for n, g in self.groups.items()},
            "roles": {r: c.to_json() for r, c in self.roles.items()},
            "values": dict(self.values),
        }

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON of question and answer."""
        return hashlib.sha256(canonical_json(self._body()).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            **self._body(),
            "digest": self.digest,
            "because": {k: list(v) for k, v in self.because.items()},
            "eligible": {k: list(v) for k, v in self.eligible.items()},
            "rejections": [r.to_json() for r in self.rejections],
            "plugins": [p.to_json() for p in self.plugins],
            "versions": dict(sorted(self.versions.items())),
        }

    def dumps(self) -> str:
        """Canonical JSON: sorted keys, no spaces, so that equal decisions are equal bytes."""
        return canonical_json(self.to_json())

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> Decision:
        """Read back what ``to_json`` or ``dumps`` wrote. Raises :class:`BadInputError` for anything else."""
        from attn_core.errors import BadInputError

        try:
            d = json.loads(data) if isinstance(data, str) else data
            if d["schema"] != SCHEMA:
                raise BadInputError(f"decision has schema {d['schema']}, this attn-core reads schema {SCHEMA}")
            devices = {"": d["device"]} if "device" in d else d["devices"]
            groups = {
                name: GroupDecision(
                    choices={r: Choice.from_json(c) for r, c in g.items() if r != "values"}, values=g["values"]
                )
                for name, g in d["groups"].items()
            }
            return cls(
                devices={r: Device.from_json(x) for r, x in devices.items()},
                model=ModelSpec.from_json(d["model"]),
                options=EngineOptions.from_json(d["options"]),
                groups={n: groups[n] for n in d["model"]["groups"] if n in groups},
                roles={r: Choice.from_json(c) for r, c in d["roles"].items()},
                values=d["values"],
                because={k: tuple(v) for k, v in d["because"].items()},
                eligible={k: tuple(v) for k, v in d["eligible"].items()},
                rejections=tuple(Rejection.from_json(r) for r in d["rejections"]),
                plugins=tuple(PluginReport(**p) for p in d["plugins"]),
                versions=d["versions"],
            )
        except (KeyError, TypeError, json.JSONDecodeError, AttributeError) as e:
            raise BadInputError(f"this is not a decision of attn-core ({type(e).__name__}: {e})") from None

    def explain(self, *, verbose: bool = False) -> str:
        """The decision as text a person reads: what was chosen, why, and what was refused."""
        from attn_core.explain import explain

        return explain(self, verbose=verbose)


def canonical_json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
