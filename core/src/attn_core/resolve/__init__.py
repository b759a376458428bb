"""The verb: ``resolve(devices, model, options, catalog, installed) -> Decision``.

A pure function: no torch, no environment, no clock. Plugins stated facts; here, and only here, they are merged:

0. shard the model's groups by tensor parallelism,
1. judge every backend on its own (``judge.py``),
2. combine the survivors of each group, best first (``combine.py``),
3. settle the values that groups share: for every assignment each group's best combination, then the best total,
4. or refuse, with every reason and what each pin costs (``refuse.py``).

Why step 3 is exact: the key is separable over groups (replacing one group's combination by a better one never
worsens the total), so for a fixed assignment each group's first fit is optimal, and all assignments are tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product

from attn_core.catalog import Catalog, Installed
from attn_core.errors import BadInputError
from attn_core.resolve import refuse, settle
from attn_core.resolve.combine import Combination, GroupSpace, Key, Universe, shared_universe
from attn_core.resolve.judge import Facts, Judge, Raw, Row
from attn_core.resolve.solve import best_total
from attn_core.spec import ACCOMPANYING, Decision, Device, EngineOptions, ModelSpec
from attn_core.spec.model import Group

MODEL_ROLES = ("allreduce_fusion",)


def resolve(
    devices: Device | Mapping[str, Device],
    model: ModelSpec,
    options: EngineOptions,
    catalog: Catalog,
    installed: Installed,
) -> Decision:
    """The best decision all plugins, pins and constraints allow, or :class:`NoBackendError`.

    ``devices`` is one device, or one per role for disaggregated serving (``kv_write`` defaults to where decode runs).
    Raises :class:`BadInputError` when the question contradicts itself.
    """
    problem = Problem(devices, model, options, catalog, installed)
    best = problem.solve()
    if best is None:
        raise refuse.no_backend(problem)
    decision = settle.decision(problem, *best)
    refuse.check_reference(problem, decision)
    return decision


class Problem:
    """One question, taken apart: a space of candidates per group, and the values they share."""

    def __init__(
        self,
        devices: Device | Mapping[str, Device],
        model: ModelSpec,
        options: EngineOptions,
        catalog: Catalog,
        installed: Installed,
        *,
        roles: Collection[str] | None = None,
        shared: Universe | None = None,
    ) -> None:
        """``roles``: those asked for here, None for all; ``shared``: assignments that other problems share too."""
        self.model, self.options, self.catalog, self.installed = model, options, catalog, installed
        self.asked = None if roles is None else frozenset(roles)
        self.groups: dict[str, Group] = {n: g.sharded(options.tensor_parallel) for n, g in model.groups.items()}
        self.devices = self._devices(devices)
        self._facts: dict[tuple[str, str], Facts] = {}
        self.rejected: list[tuple[Judge, Row]] = []
        self._check_pins()
        used = [catalog.devices[k] for k in dict.fromkeys(str(d) for d in self.devices.values())]
        self.shared: Universe = shared_universe(self.groups, options, used) if shared is None else shared
        self.spaces = [self._space(n, g) for n, g in self.groups.items() if self._roles(g)]
        self.spaces.append(self._model_space())

    def _devices(self, devices: Device | Mapping[str, Device]) -> dict[str, Device]:
        """Role -> device for every role the model has; ``""`` alone when one device serves them all."""
        given = {"": devices} if isinstance(devices, Device) else dict(devices)
        roles = dict.fromkeys(r for g in self.groups.values() for r in g.roles)
        if "" not in given:
            if missing := [r for r in roles if r not in given and r not in ACCOMPANYING]:
                raise BadInputError(f"no device given for role {missing[0]}; roles of this model: {', '.join(roles)}")
            if unknown := [r for r in given if r not in (*roles, *MODEL_ROLES)]:
                raise BadInputError(f"unknown role {unknown[0]!r} in devices; roles of this model: {', '.join(roles)}")
            if len({id(d) for d in given.values()}) > 1 or len(set(map(str, given.values()))) > 1:
                given = {
                    r: given.get(r) or given.get("decode") or next(iter(given.values())) for r in (*roles, *MODEL_ROLES)
                }
            else:
                given = {"": next(iter(given.values()))}
        for d in given.values():
            if str(d) not in self.catalog.devices:
                raise BadInputError(f"the catalog was not made for {d}; it holds {', '.join(self.catalog.devices)}")
        return given

    def _roles(self, group: Group) -> tuple[str, ...]:
        return group.roles if self.asked is None else tuple(r for r in group.roles if r in self.asked)

    def device(self, role: str) -> Device:
        return self.devices[role] if role in self.devices else self.devices[""]

    def _check_pins(self) -> None:
        for field in ("backend", "prefill_backend", "decode_backend"):
            pin = getattr(self.options, field)
            for name in pin if isinstance(pin, Mapping) else ():
                if name not in self.groups:
                    raise BadInputError(
                        f"{field} names group {name!r}; the model's groups are {', '.join(self.groups)}"
                    )

    def _judge(self, name: str, group: Group, role: str, widths: tuple[int, ...] = ()) -> Judge:
        device = self.device(role)
        written_for = self.catalog.devices[str(device)].written_for
        facts = self._facts.get((name, str(device)))
        if facts is None:
            facts = self._facts[name, str(device)] = Facts(group, device, self.options)
        return Judge(name, facts, role, device, self.options, self.installed, written_for, widths)

    def _rows(self, judge: Judge) -> Sequence[Row]:
        return self.catalog.devices[str(judge.device)].rows.get(judge.role, ())

    def reasons(self) -> list[Raw]:
        """Every reason against every row that was not eligible."""
        return [reason for judge, row in self.rejected for reason in judge.reasons(row)]

    def _space(self, name: str, group: Group) -> GroupSpace:
        judges, candidates = {}, {}
        widths: tuple[int, ...] = ()
        for role in self._roles(group):  # kv_write comes last: it must serve the widths the others may settle on
            judges[role] = judge = self._judge(name, group, role, widths if role in ACCOMPANYING else ())
            candidates[role] = judge.candidates(self._rows(judge), self.rejected)
            if role not in ACCOMPANYING:
                widths = tuple(sorted({*widths, *(c.widths[0] for c in candidates[role] if c.widths[0])}))
        return GroupSpace(name, group, candidates, judges, self.shared, self.catalog.devices, self.options, widths)

    def _model_space(self) -> GroupSpace:
        first = next(iter(self.groups.values()))
        judges = {r: self._judge("", first, r) for r in MODEL_ROLES}
        candidates = {r: j.candidates(self._rows(j), self.rejected) for r, j in judges.items() if self._rows(j)}
        return GroupSpace("", None, candidates, judges, self.shared, self.catalog.devices, self.options)

    def solve(self) -> tuple[Key, list[Combination], int] | None:
        """Best total key, one combination per space, and the shared assignments all of them allow."""
        answers = [best_total(self.shared, self.spaces, only) for only in self.uniform_choices()]
        return min((a for a in answers if a is not None), key=lambda a: a[0], default=None)

    def uniform_choices(self) -> Iterator[Mapping[str, Mapping[str, str]]]:
        """Restrictions to try: none, or every choice of names an engine that cannot mix could run with."""
        if self.options.uniform == "none":
            yield {}
            return
        spaces = [s for s in self.spaces if s.group is not None and not s.roles[0].startswith("linear_")]
        roles = dict.fromkeys(r for s in spaces for r in s.roles if r not in ACCOMPANYING)
        names = {r: sorted({c.spec.backend for s in spaces for c in s.candidates.get(r, ())}) for r in roles}
        if self.options.uniform == "all":
            picks: Sequence[tuple[str, ...]] = [(n,) * len(roles) for n in sorted(set().union(*names.values()))]
        else:
            picks = list(product(*names.values()))
        for pick in picks:
            by_role = dict(zip(roles, pick))
            yield {s.name: by_role for s in spaces}


__all__ = ["Problem", "resolve"]
