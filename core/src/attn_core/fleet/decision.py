"""What a fleet decided: a Decision per kind of ranks, and which ranks are of that kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attn_core.errors import BadInputError
from attn_core.fleet.ranks import Ranks
from attn_core.resolve.judge import Rejections
from attn_core.resolve.refuse_joint import RankRejection
from attn_core.spec import ACCOMPANYING, Decision, Rejection
from attn_core.spec.decision import canonical_json

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Ranks that are alike, and what they decided."""

    ranks: Ranks
    roles: tuple[str, ...] | None
    """Roles of the model these ranks run; None for all."""
    decision: Decision

    def __str__(self) -> str:
        return f"{self.ranks} ({self.decision.device})"

    def to_json(self) -> dict[str, Any]:
        roles = None if self.roles is None else list(self.roles)
        return {"ranks": [list(s) for s in self.ranks.spans], "roles": roles, "decision": self.decision.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Kind:
        return cls(
            ranks=Ranks(tuple((int(a), int(b)) for a, b in data["ranks"])),
            roles=None if data["roles"] is None else tuple(data["roles"]),
            decision=Decision.from_json(data["decision"]),
        )


@dataclass(frozen=True, kw_only=True)
class FleetDecision:
    """One decision for all ranks. Equal fleets give equal bytes, whoever computes them."""

    kinds: tuple[Kind, ...]

    @property
    def size(self) -> int:
        return sum(len(k.ranks) for k in self.kinds)

    @property
    def values(self) -> dict[str, Any]:
        """Values that all ranks have: ``page_size``, ``kv_cache_dtype``, and others where they are equal."""
        first = self.kinds[0].decision.values
        return {n: v for n, v in first.items() if all(k.decision.values.get(n) == v for k in self.kinds)}

    def kind_of(self, rank: int) -> Kind:
        for kind in self.kinds:
            if rank in kind.ranks:
                return kind
        raise BadInputError(f"rank={rank} is not one of the {self.size} ranks of this fleet")

    def decision_of(self, rank: int) -> Decision:
        return self.kind_of(rank).decision

    @property
    def mixed(self) -> list[str]:
        """Places (``group.role``) where kinds attend with different backends: equal up to rounding, not bit by bit."""
        names: dict[str, set[str]] = {}
        for kind in self.kinds:
            for group, g in kind.decision.groups.items():
                for role, c in ((r, c) for r, c in g.choices.items() if r not in ACCOMPANYING):
                    names.setdefault(f"{group}.{role}", set()).add(f"{c.platform}:{c.backend}")
        return sorted(place for place, found in names.items() if len(found) > 1)

    @property
    def rejections(self) -> Sequence[Rejection]:
        """Every kind's, each with the ranks it holds for; worked out when read."""
        return Rejections(lambda: (RankRejection.of(r, str(k)) for k in self.kinds for r in k.decision.rejections))

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of who decided what; explanations are left out."""
        kinds = [{**k.to_json(), "decision": k.decision.digest} for k in self.kinds]
        return hashlib.sha256(canonical_json({"schema": SCHEMA, "kinds": kinds}).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "digest": self.digest, "ranks": self.size, "values": self.values, "mixed": self.mixed,
            "kinds": [k.to_json() for k in self.kinds],
        }  # fmt: skip

    def dumps(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return canonical_json(self.to_json())

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> FleetDecision:
        """Read back what ``to_json`` or ``dumps`` wrote. Raises :class:`BadInputError` for anything else."""
        try:
            d = json.loads(data) if isinstance(data, str) else data
            if d["schema"] != SCHEMA:
                raise BadInputError(f"fleet decision has schema {d['schema']}, this attn-core reads schema {SCHEMA}")
            return cls(kinds=tuple(map(Kind.from_json, d["kinds"])))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, BadInputError):
                raise
            raise BadInputError(f"this is not a fleet decision of attn-core ({type(e).__name__}: {e})") from None

    def explain(self, *, verbose: bool = False) -> str:
        """As text: what all ranks share, then every kind's decision."""
        return "\n".join(self._lines(verbose))

    def _lines(self, verbose: bool) -> Iterator[str]:
        shared = ", ".join(f"{n} {v}" for n, v in self.values.items())
        yield f"{self.size} ranks of {len(self.kinds)} kinds   [{self.digest}]"
        yield f"  on all ranks: {shared}"
        if self.mixed:
            yield f"  different backends, so equal up to rounding only: {', '.join(self.mixed)}"
        for kind in self.kinds:
            does = f", {' and '.join(kind.roles)} only" if kind.roles else ""
            yield f"{kind.ranks}{does}:"
            yield from (f"  {line}" for line in kind.decision.explain(verbose=verbose).splitlines())
