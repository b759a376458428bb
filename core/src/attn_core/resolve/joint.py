"""One question for several kinds of ranks: a Decision for each, equal in everything that ranks share.

Every kind is a :class:`Problem` of its own, with its own device, packages and roles; all live in one universe. What
must be equal is

* ``kv_cache_dtype`` and ``page_size`` for all, so that one scheduler's block tables hold everywhere,
* of every cached group ``kv_layout`` and the kernels' ``head_dim``: a page is the same bytes on every rank,
* ``graph`` and ``allreduce_fusion`` among ranks with the same roles: they step together.

Exactness: for one assignment of what is shared, and one of what a group shares, kinds are independent of each other,
so each kind's first fit is optimal; the key is separable over kinds as it is over groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from attn_core.catalog import Catalog, Installed
from attn_core.errors import BadInputError
from attn_core.resolve import Problem, settle
from attn_core.resolve.combine import Combination, GroupSpace, Key, Universe, merge, shared_universe, union, universe
from attn_core.resolve.refuse_joint import check_references, no_joint
from attn_core.resolve.solve import best_total
from attn_core.spec import Decision, Device, EngineOptions, ModelSpec

SAME_CACHE = ("head_dim", "kv_layout")
"""Local values of a cached group that every kind must settle alike."""
MOST_SIDES = 3
MOST_UNIFORM = 512


@dataclass(frozen=True, kw_only=True)
class Member:
    """One kind of ranks: what they have in common, and how to name them."""

    where: str
    """``ranks 0 to 7 (cuda:sm_90)``"""
    device: Device
    catalog: Catalog
    """Made for ``device``."""
    installed: Installed
    roles: frozenset[str] | None = None
    """Roles these ranks run; None for all of the model's."""


def resolve_jointly(members: Sequence[Member], model: ModelSpec, options: EngineOptions) -> list[Decision]:
    """A Decision for each member, in their order, equal in what ranks share; the best that all of them allow.

    Raises :class:`NoBackendError` naming the ranks that stand in the way and what leaving them out, or taking back a
    pin, would give; :class:`BadInputError` for members that contradict the model. One member with all roles gets
    what :func:`attn_core.resolve.resolve` gives.
    """
    joint = Joint(members, model, options)
    best = joint.solve()
    if best is None:
        raise no_joint(joint)
    decisions = joint.decisions(*best)
    check_references(joint, decisions)
    return decisions


class Joint:
    """The problems of all members, and their spaces joined group by group."""

    def __init__(self, members: Sequence[Member], model: ModelSpec, options: EngineOptions) -> None:
        if not members:
            raise BadInputError("a fleet needs at least one rank")
        self.members, self.model, self.options = tuple(members), model, options
        self.shared, views = self._universes()
        self.problems = [
            Problem(m.device, model, options, m.catalog, m.installed, roles=m.roles, shared=views[m.roles])
            for m in self.members
        ]
        for member, problem in zip(self.members, self.problems):
            if all(space.group is None for space in problem.spaces):
                raise BadInputError(f"{member.where}: the model has nothing for roles {', '.join(member.roles or ())}")
        names = dict.fromkeys(space.name for problem in self.problems for space in problem.spaces)
        self.spaces = [JointSpace(name, self) for name in names]

    def _universes(self) -> tuple[Universe, dict[frozenset[str] | None, Universe]]:
        """All shared assignments, and how each side (set of roles) sees them: with its own graph mode."""
        groups = {n: g.sharded(self.options.tensor_parallel) for n, g in self.model.groups.items()}
        catalogs = [m.catalog.devices[str(m.device)] for m in self.members]
        plain = shared_universe(groups, self.options, catalogs)
        sides = sorted({m.roles for m in self.members}, key=lambda roles: sorted(roles or ()))
        if len(sides) == 1:
            return plain, {sides[0]: plain}
        if len(sides) > MOST_SIDES:
            raise BadInputError(f"a fleet may have at most {MOST_SIDES} different sets of roles; this has {len(sides)}")
        rest = tuple((n, v) for n, v in plain.fields.items() if n != "graph")
        whole = universe((*((f"graph {i}", plain.fields["graph"]) for i in range(len(sides))), *rest))
        same = {n: n for n, _ in rest}
        return whole, {side: whole.seen_as({"graph": f"graph {i}", **same}) for i, side in enumerate(sides)}

    def solve(self) -> tuple[list[JointFit], int] | None:
        """One fit per joined space, and the shared assignments all of them allow."""
        answers = [best_total(self.shared, self.spaces, only) for only in self._uniform_choices()]
        best = min((a for a in answers if a is not None), key=lambda a: a[0], default=None)
        return None if best is None else best[1:]

    def _uniform_choices(self) -> Iterator[Mapping[str, Any]]:
        """Restrictions by space, then by member: an engine that cannot mix chooses its names per kind of ranks."""
        if self.options.uniform == "none":
            yield {}
            return
        able = [[c for c in p.uniform_choices() if best_total(p.shared, p.spaces, c)] for p in self.problems]
        if (many := math.prod(map(len, able))) > MOST_UNIFORM:
            raise BadInputError(
                f"uniform={self.options.uniform!r} leaves {many} choices of backends over {len(able)} kinds of ranks, "
                f"more than {MOST_UNIFORM}; pin some with backend=, prefill_backend= or decode_backend="
            )
        for choice in product(*able):
            yield {s.name: {i: c.get(s.name) for i, c in enumerate(choice)} for s in self.spaces}

    def decisions(self, fits: Sequence[JointFit], mask: int) -> list[Decision]:
        """What every member decides, given the fits of :meth:`solve` and the assignments they leave."""
        chosen = {(i, s.name): c for s, fit in zip(self.spaces, fits) for i, c in zip(s.members, fit.picks)}
        parts = [
            settle.Part(p, [chosen[i, s.name] for s in p.spaces], m.where if len(self.members) > 1 else "")
            for i, (m, p) in enumerate(zip(self.members, self.problems))
        ]
        settled = settle.settle_shared(parts, mask)
        fixed = {s.name: s.settle(fit, settled[0].bit) for s, fit in zip(self.spaces, fits)}
        outside = [lambda i=i: self._outside(i, fits) for i in range(len(parts))]
        return [settle.decided(part, s, fixed, o) for part, s, o in zip(parts, settled, outside)]

    def _outside(self, member: int, fits: Sequence[JointFit]) -> list[int]:
        """For each space of one member, what the other groups, and the other kinds in the same group, allow."""
        out = []
        for space in self.problems[member].spaces:
            at = next(i for i, s in enumerate(self.spaces) if s.name == space.name)
            rest = self.shared.full
            for other in (*fits[:at], *fits[at + 1 :]):
                rest &= other.shared
            allowed = space.full & space.ones * rest
            for i, c in zip(self.spaces[at].members, fits[at].picks):
                if i != member:
                    allowed &= self.spaces[at].loosened(c.mask)
            out.append(allowed)
        return out


class JointFit(NamedTuple):
    """A combination for every member that has the group."""

    key: Key
    picks: tuple[Combination, ...]
    shared: int


class JointSpace:
    """One group (or the model's roles, ``""``) on all members that have it."""

    def __init__(self, name: str, joint: Joint) -> None:
        self.name = name
        found = [(i, s) for i, p in enumerate(joint.problems) for s in p.spaces if s.name == name]
        self.members: tuple[int, ...] = tuple(i for i, _ in found)
        self.spaces: list[GroupSpace] = [s for _, s in found]
        self.sides = [joint.members[i].roles for i in self.members]
        local = _common_local([s.local for s in self.spaces])
        for space in self.spaces:
            if space.local is not local:
                space.live_in(local)
        cached = self.spaces[0].group is not None and self.spaces[0].group.cached
        self.same = SAME_CACHE if cached else ()
        self.classes = self._classes(local)

    def _classes(self, local: Universe) -> list[int]:
        """Local assignments that agree in what kinds must share, as masks over them."""
        at = [list(local.fields).index(n) for n in self.same]
        out: dict[tuple[Any, ...], int] = {}
        for i, a in enumerate(local.assignments):
            where = tuple(a[k] for k in at)
            out[where] = out.get(where, 0) | 1 << i
        return list(out.values())

    def loosened(self, mask: int) -> int:
        """``mask`` and every assignment that differs from one in it only in what kinds need not share."""
        one = self.spaces[0]
        if len(one.local.assignments) == 1:
            return mask
        parts = [mask >> (i * one.width) & one.shared.full for i in range(len(one.local.assignments))]
        out = 0
        for c in self.classes:
            where = [i for i in range(len(parts)) if c >> i & 1]
            together = union(parts[i] for i in where)
            for i in where:
                out |= together << (i * one.width)
        return out

    def reach_of(self, space: GroupSpace) -> int:
        """Local x shared assignments that some row of every role of one member allows, loosened."""
        out = space.full
        for role in space.roles:
            out &= union(space.masks[role].values())
        return self.loosened(out)

    @property
    def _reach(self) -> int:
        out = self.spaces[0].full
        for space in self.spaces:
            out &= self.reach_of(space)
        return out

    @property
    def reach(self) -> int:
        return self.spaces[0].project(self._reach)

    @property
    def size(self) -> int:
        return math.prod(s.size for s in self.spaces)

    def frontier(
        self, within: int, only: Mapping[int, Any] | None = None, *, first: bool = False
    ) -> list[tuple[int, JointFit]]:
        """See :class:`attn_core.resolve.solve.Space`; ``only`` is by member."""
        bits = self._reach & self.spaces[0].ones * within
        restrictions = self._alike() if self.spaces[0].group is None else [only or {}]
        fits = sorted((f for r in restrictions for f in self._fits(bits, r)), key=lambda f: f.key)
        covered, out = 0, []
        for fit in fits:
            new = fit.shared & within & ~covered
            if new:
                out.append((new, fit))
                covered |= new
                if first or covered == within:
                    break
        return out

    def _alike(self) -> Iterator[Mapping[int, Mapping[str, str]]]:
        """The model's own roles are collectives: ranks that step together must run one backend."""
        sides = list(dict.fromkeys(self.sides))
        choices: list[list[tuple[tuple[str, str], ...]]] = []
        for side in sides:
            mine = [s for s, of in zip(self.spaces, self.sides) if of == side]
            roles = dict.fromkeys(r for s in mine for r in s.roles)
            offered = {r: [{c.spec.backend for c in s.candidates[r]} for s in mine if r in s.roles] for r in roles}
            names = [[(r, n) for n in sorted(set.intersection(*sets))] for r, sets in offered.items()]
            choices.append(list(product(*names)))
        for choice in product(*choices):
            by_side = {side: dict(pairs) for side, pairs in zip(sides, choice)}
            yield {i: by_side[side] for i, side in zip(self.members, self.sides)}

    def _fits(self, bits: int, only: Mapping[int, Any]) -> Iterator[JointFit]:
        """Every tuple of the members' first fits, over local x shared assignments in ``bits``."""
        parts: list[tuple[int, tuple[Combination, ...]]] = [(bits, ())]
        for i, space in zip(self.members, self.spaces):
            frontier: list[tuple[int, Combination]] = []
            left = union(p for p, _ in parts)
            for c in space.combinations(only.get(i)):
                new = self.loosened(c.mask) & left
                if new:
                    frontier.append((new, c))
                    left &= ~new
                    if not left:
                        break
            parts = [(p & new, (*picks, c)) for p, picks in parts for new, c in frontier if p & new]
        for _, picks in parts:
            allowed = self.spaces[0].full
            for c in picks:
                allowed &= self.loosened(c.mask)
            yield JointFit(merge([c.key for c in picks]), picks, self.spaces[0].project(allowed))

    def settle(self, fit: JointFit, bit: int) -> dict[str, Any]:
        """What the group's cache is on every member, by preference: decode speaks first, as everywhere."""
        if not self.same:
            return {}
        local = self.spaces[0].local
        mask = local.full
        for space, c in zip(self.spaces, fit.picks):
            mask &= union(k for k in self.classes if k & settle.locals_left(space, c, bit))
        picks = [p for space, c in zip(self.spaces, fit.picks) for p in settle.speaking_order(space, c)]
        picks.sort(key=lambda p: (*settle.SPEAKING, p[0]).index(p[0]))
        out = {}
        for name in self.same:
            out[name] = value = settle.preferred_local(name, local.allowed(name, mask), picks)
            mask &= local.value_mask[name][value]
        return out


def _common_local(found: Sequence[Universe]) -> Universe:
    """Local values of all members together, in the order each of them has: widths ascending, layouts by name."""
    fields = []
    for name in found[0].fields:
        values = {v for u in found for v in u.fields[name] if v is not None}
        same = all(u.fields[name] == found[0].fields[name] for u in found)
        fields.append((name, found[0].fields[name] if same else tuple(sorted(values)) or (None,)))
    return universe(tuple(fields))


__all__ = ["Joint", "Member", "resolve_jointly"]
