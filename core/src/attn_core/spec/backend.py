"""What a vendor promises: backends, what they need, and rules on combinations. Frozen data; only the core concludes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from attn_core.domain import Domain, Value, domain
from attn_core.errors import DeclarationError
from attn_core.spec.check import nearest
from attn_core.spec.fields import FIELDS

ROLES = ("encode", "prefill", "decode", "kv_write", "linear_prefill", "linear_decode", "allreduce_fusion")
ACCOMPANYING = frozenset({"kv_write", "allreduce_fusion"})
"""Roles with a reference answer in core: they never make a model infeasible for lack of a vendor kernel."""


class Tier(IntEnum):
    """How good a backend claims to be in its role. ``rank`` orders inside a tier."""

    REFERENCE = 0
    PORTABLE = 1
    TUNED = 2
    BEST = 3


@dataclass(frozen=True)
class Requirement:
    """A package or toolkit a backend needs, as a version range, with the symbols that prove it is the right one.

    ``Requirement("flashinfer-python>=0.7", written_for="0.7.2", symbols=("flashinfer.decode",),
    install="pip install flashinfer-python")``. A name found in ``Device.versions`` (``cuda``, ``cann``) is a toolkit.
    """

    spec: str
    written_for: str | None = None
    """Version the backend was written against; what a what-if assumes to be installed."""
    symbols: tuple[str, ...] = ()
    """Modules whose presence proves the package; PyPI has strangers named ``mate`` and ``aiter``."""
    install: str | None = None
    """What the user should do to get it."""

    def __post_init__(self) -> None:
        try:
            parsed = _parse(self.spec)
        except ValueError as e:
            raise DeclarationError(f"requires={self.spec!r} is not a requirement like 'package>=1.2': {e}") from None
        object.__setattr__(self, "symbols", tuple(self.symbols))
        object.__setattr__(self, "name", canonical(parsed.name))
        object.__setattr__(self, "range", str(parsed.specifier))

    name: str = field(init=False, compare=False, default="")
    """Canonical name of the package or toolkit."""
    range: str = field(init=False, compare=False, repr=False, default="")
    """The version range alone, as text."""

    def admits(self, version: str) -> bool:
        """Whether a version lies in the range. Pre-releases count: a nightly has the kernels of its number."""
        return _admits(self.spec, version)


def _parse(spec: str) -> Any:
    from packaging.requirements import Requirement as Pep508  # a third of core's import time, so only when needed

    return Pep508(spec)


@lru_cache(maxsize=4096)
def _admits(spec: str, version: str) -> bool:
    return bool(_parse(spec).specifier.contains(version, prereleases=True))


def canonical(name: str) -> str:
    """Package name as packaging compares it: lower case, runs of ``-_.`` as one ``-``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _accepts(where: str, accepts: Mapping[str, object]) -> Mapping[str, Domain]:
    out: dict[str, Domain] = {}
    for name in sorted(accepts):
        spec = FIELDS.get(name)
        if spec is None:
            raise DeclarationError(f"{where}: accepts unknown field {name!r}{nearest(name, FIELDS)}")
        d = domain(accepts[name])
        for v in (d.values or ()) + d.excluded:
            ok = v is None or (type(v) is spec.type) or (spec.type is float and type(v) is int)
            if not ok or (spec.choices and v is not None and v not in spec.choices):
                allowed = f"one of {', '.join(spec.choices)}" if spec.choices else f"of type {spec.type.__name__}"
                raise DeclarationError(f"{where}: {name} accepts {v!r}, but its values are {allowed}")
        if d.step is not None and spec.type is not int:
            raise DeclarationError(f"{where}: {name} is not an integer, MultipleOf cannot apply")
        if d.values == ():
            raise DeclarationError(f"{where}: {name} accepts nothing; leave the backend out instead")
        out[name] = d
    return MappingProxyType(out)


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """A vendor's promise for one backend in one role on one device. Identity is (platform, backend).

    ``accepts`` maps names of ``FIELDS`` to domains; shorthand: ``True`` claims any value, a list is ``OneOf``, a
    single value means only that. Features that are not claimed are refused. Raises :class:`DeclarationError`.
    """

    backend: str
    role: str
    platform: str
    accepts: Mapping[str, Any]
    tier: Tier = Tier.PORTABLE
    rank: int = 0
    """Order inside a tier; smaller is better."""
    form: str | None = None
    """MLA only: ``absorbed`` (runs on the latent cache) or ``materialised`` (expanded k and v)."""
    needs: frozenset[str] = frozenset()
    """ISA tokens the device must have, all of them."""
    requires: tuple[Requirement | str, ...] = ()
    pads: frozenset[str] = frozenset()
    """``head_dim`` and/or ``num_heads``: widths the core may pad with zeros to reach an accepted one."""
    unified: bool = False
    """One kernel serves prefill and decode rows in a single call."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Kernels chosen per step inside the plan: name -> condition in words. Shown in the decision."""
    bind: str | None = None
    """``module:function`` taking a Binding; None: decided here, run by the engine."""
    evidence: str = ""
    """Where the claims come from: project, file or thread, version."""
    plugin: str = ""
    """Stamped by the core; what a plugin writes here is ignored."""

    def __post_init__(self) -> None:
        where = f"BackendSpec({self.backend!r}, {self.role!r})"
        put = object.__setattr__
        for name in ("backend", "role", "platform"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise DeclarationError(f"{where}: {name} must be a non-empty string")
        if self.role not in ROLES:
            raise DeclarationError(f"{where}: unknown role{nearest(self.role, ROLES)}; roles are {', '.join(ROLES)}")
        if not isinstance(self.accepts, Mapping):
            raise DeclarationError(f"{where}: accepts must be a mapping of field name to domain")
        put(self, "accepts", _accepts(where, self.accepts))
        try:
            given: Any = self.tier
            put(self, "tier", Tier[given] if isinstance(given, str) else Tier(given))
        except (KeyError, ValueError):
            raise DeclarationError(f"{where}: tier={self.tier!r} is not one of {[t.name for t in Tier]}") from None
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise DeclarationError(f"{where}: rank={self.rank!r} must be an integer")
        if self.form not in (None, "absorbed", "materialised"):
            raise DeclarationError(f"{where}: form={self.form!r} must be 'absorbed', 'materialised' or None")
        for name in ("needs", "pads"):
            value = getattr(self, name)
            put(self, name, frozenset([value] if isinstance(value, str) else value))
        if not self.pads <= {"head_dim", "num_heads"}:
            raise DeclarationError(f"{where}: pads={sorted(self.pads)} may hold head_dim and num_heads only")
        reqs = (self.requires,) if isinstance(self.requires, str | Requirement) else tuple(self.requires)
        put(self, "requires", tuple(r if isinstance(r, Requirement) else Requirement(r) for r in reqs))
        put(self, "variants", MappingProxyType(dict(self.variants)))
        if self.bind is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.bind):
            raise DeclarationError(f"{where}: bind={self.bind!r} must look like 'package.module:function'")
        if self.role in ("encode", "prefill", "decode", "kv_write"):
            if "dtype" not in self.accepts:
                raise DeclarationError(f"{where}: every spec states dtype")
            if "head_dim" not in self.accepts and "head_dims" not in self.accepts:
                raise DeclarationError(f"{where}: every spec states head_dim or head_dims")

    @cached_property
    def content(self) -> str:
        """The whole row as text: a total order that depends on nothing but content."""
        parts = (
            self.backend, self.plugin, self.role, self.platform, self.form, sorted(self.needs), sorted(self.pads),
            self.unified, self.bind, [(k, repr(d)) for k, d in self.accepts.items()],
            [r.spec for r in self.requires if isinstance(r, Requirement)], sorted(self.variants.items()), self.evidence,
        )  # fmt: skip
        return repr(parts)

    def __hash__(self) -> int:
        return hash(self.content)

    def claims(self, name: str) -> bool:
        """Whether a claim-scope feature (``appends``, ``native_out``, ``strided_out``) is made."""
        return name in self.accepts and True in self.accepts[name]


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A vendor's rule over combinations: whenever all of ``when`` holds, all of ``then`` must.

    Keys are roles (the domain is over backend names) or names of ``FIELDS``. Evaluated inside one group, and only for
    combinations that one of the plugin's own backends takes part in. A role or value the group lacks makes the rule
    inapplicable.
    """

    name: str
    when: Mapping[str, Any]
    then: Mapping[str, Any]
    because: str
    evidence: str = ""
    plugin: str = ""
    """Stamped by the core."""

    def __post_init__(self) -> None:
        where = f"Constraint({self.name!r})"
        if not isinstance(self.name, str) or not self.name or not isinstance(self.because, str) or not self.because:
            raise DeclarationError(f"{where}: needs a name and a because")
        if not self.then:
            raise DeclarationError(f"{where}: 'then' must state something")
        for side in ("when", "then"):
            mapping: Mapping[str, object] = getattr(self, side)
            fields = {k: v for k, v in mapping.items() if k not in ROLES}
            claims = [k for k in fields if k in FIELDS and FIELDS[k].scope == "claim"]
            if claims:
                raise DeclarationError(f"{where}: {claims[0]} is a claim of one backend, not a fact or value")
            roles = {k: domain(v) for k, v in mapping.items() if k in ROLES}
            object.__setattr__(self, side, MappingProxyType({**roles, **_accepts(where, fields)}))

    @cached_property
    def content(self) -> str:
        sides = [[(k, repr(d)) for k, d in sorted(side.items())] for side in (self.when, self.then)]
        return repr((self.plugin, self.name, sides, self.because, self.evidence))

    def __hash__(self) -> int:
        return hash(self.content)

    @property
    def names(self) -> Iterable[str]:
        return (*self.when, *self.then)


def mentioned(domains: Iterable[Domain]) -> tuple[Value, ...]:
    """Every value that some domain names, without duplicates, in order."""
    return tuple(dict.fromkeys(v for d in domains for v in d.named))
