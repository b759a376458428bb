"""Steps 2 and 3: combine the survivors of a group in order of preference, as bit masks over the shared values."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from operator import itemgetter
from typing import Any, NamedTuple

from attn_core.catalog import DeviceCatalog
from attn_core.domain import Domain
from attn_core.resolve.judge import Candidate, Judge, admits
from attn_core.spec import ACCOMPANYING, Constraint, EngineOptions
from attn_core.spec.check import KV_CACHE_DTYPES
from attn_core.spec.fields import FIELDS, GRAPHS, LOCAL, PAGE_SIZES, RELEVANT, SHARED
from attn_core.spec.model import Group

Key = tuple[Any, ...]
_SHARED = frozenset(SHARED)


class Universe:
    """The finite assignments of some fields; a domain becomes a bit mask over them, intersection is ``&``.

    Immutable but for its memory of masks already computed; equal fields share one instance (:func:`universe`).
    """

    def __init__(self, fields: tuple[tuple[str, tuple[Any, ...]], ...]) -> None:
        self.fields = dict(fields)
        self.assignments = tuple(product(*self.fields.values()))
        self.full = (1 << len(self.assignments)) - 1
        self.value_mask = {
            name: {v: sum(1 << b for b, a in enumerate(self.assignments) if a[i] == v) for v in values}
            for i, (name, values) in enumerate(self.fields.items())
        }

        self._masks: dict[int, tuple[Domain, str | None, int]] = {}

    def mask(self, name: str, d: Domain, own: str | None = None) -> int:
        """Assignments whose ``name`` lies in ``d``. ``own``: what ``auto`` stands for as a cache dtype."""
        known = self._masks.get(id(d))
        if known is not None and known[0] is d and known[1] == own:
            return known[2]
        mask = sum(m for v, m in self.value_mask[name].items() if v is None or admits(name, v, d, own))
        self._masks[id(d)] = d, own, mask
        return mask

    def allowed(self, name: str, mask: int) -> tuple[Any, ...]:
        """Values of one field that some assignment in ``mask`` has, in universe order."""
        return tuple(v for v, m in self.value_mask[name].items() if m & mask)

    def seen_as(self, names: Mapping[str, str]) -> Universe:
        """The same assignments with fields under other names: name in the view -> name here."""
        view = Universe(())
        view.assignments, view.full = self.assignments, self.full
        view.fields = {new: self.fields[old] for new, old in names.items()}
        view.value_mask = {new: self.value_mask[old] for new, old in names.items()}
        return view


@lru_cache(maxsize=256)
def universe(fields: tuple[tuple[str, tuple[Any, ...]], ...]) -> Universe:
    return Universe(fields)


def shared_universe(groups: Mapping[str, Group], options: EngineOptions, catalogs: Sequence[DeviceCatalog]) -> Universe:
    """Every number that a row, a constraint or a pin names, times cache dtypes, times graph modes."""
    dtypes = dict.fromkeys(g.dtype for g in groups.values() if g.cached)
    pins = {name: getattr(options, name) for name in SHARED}
    if not dtypes:
        graphs = (pins["graph"],) if pins["graph"] else GRAPHS
        return universe((("graph", graphs), ("kv_cache_dtype", (None,)), ("page_size", (None,))))
    named = {n: set().union(*(c.named_values[n] for c in catalogs)) for n in ("kv_cache_dtype", "page_size")}
    own = list(dtypes) if len(dtypes) == 1 else ["auto", *dtypes]
    pools: dict[str, list[Any]] = {
        "graph": list(GRAPHS),
        "kv_cache_dtype": own
        + [d for d in KV_CACHE_DTYPES if d in named["kv_cache_dtype"] and d not in (*own, "auto")],
        "page_size": [
            *PAGE_SIZES,
            *sorted(v for v in named["page_size"] if isinstance(v, int) and v not in PAGE_SIZES),
        ],
    }
    return universe(tuple((n, (pins[n],) if pins[n] is not None else tuple(pool)) for n, pool in pools.items()))


class Combination(NamedTuple):
    """One candidate per role of a group, and where it may live."""

    key: Key
    picks: tuple[Candidate, ...]
    mask: int
    """Over local x shared assignments of the group."""
    shared: int
    """``mask`` with the local values projected out."""


class GroupSpace:
    """One group's candidates, its local values, and the rules that may apply to it."""

    def __init__(
        self,
        name: str,
        group: Group | None,
        candidates: Mapping[str, list[Candidate]],
        judges: Mapping[str, Judge],
        shared: Universe,
        catalogs: Mapping[str, DeviceCatalog],
        options: EngineOptions,
        widths: tuple[int, ...] = (),
    ) -> None:
        self.name, self.group, self.shared, self.judges = name, group, shared, judges
        self.widths = widths
        """Kernel head_dims that the attention roles could run at."""
        self.roles = tuple(candidates)
        self.candidates = {r: sorted(found, key=_preference) for r, found in candidates.items()}
        """Best first by (tier, rank, padded), then content."""
        self.width = len(shared.assignments)
        self._catalogs = catalogs
        self.live_in(self._local_universe(options))

    # masks

    def live_in(self, local: Universe) -> None:
        """Work out masks and rules over these local values; again when ranks of another kind bring more of them."""
        self.local = local
        self.full = (1 << (self.width * len(local.assignments))) - 1
        self.ones = sum(1 << (i * self.width) for i in range(len(local.assignments)))
        self.masks = {role: {id(c): self._mask(c) for c in found} for role, found in self.candidates.items()}
        self.rules = [] if self.group is None else self._rules(self._catalogs)

    def _local_universe(self, options: EngineOptions) -> Universe:
        cached = self.group is not None and self.group.cached
        rows = [c.row for found in self.candidates.values() for c in found]
        layouts = set().union(*(row.layouts for row in rows)) or {"NHD"}
        mla = self.group is not None and self.group.kind == "mla"
        return universe(
            (
                ("head_dim", (None,) if mla or not self.widths else self.widths),
                (
                    "kv_layout",
                    ((options.kv_layout,) if options.kv_layout else tuple(sorted(layouts))) if cached else (None,),
                ),
                ("mla_query", ("packed", "split") if mla else (None,)),
            )
        )

    def domain_mask(self, name: str, d: Domain) -> int:
        """The part of the group's space that a domain on one settled field allows."""
        if name in SHARED:
            return self.ones * self.shared.mask(name, d, None if self.group is None else self.group.dtype)
        return self.shared.full * self._spread(self.local.mask(name, d))

    def allowed(self, name: str, mask: int) -> tuple[Any, ...]:
        """Values of one shared or local field that the group's ``mask`` leaves."""
        universe = self.local if name in LOCAL or name == "head_dim" else self.shared
        if universe is self.shared:
            return self.shared.allowed(name, self.project(mask))
        parts = [i for i in range(len(self.local.assignments)) if mask >> (i * self.width) & self.shared.full]
        return self.local.allowed(name, sum(1 << i for i in parts))

    def _mask(self, candidate: Candidate) -> int:
        """The assignments a candidate allows. Remembered on its row: universes are shared, so identity tells."""
        row, own = candidate.row, None if self.group is None else self.group.dtype
        memo = row.memo
        if memo[0] is self.shared and memo[1] is self.local and memo[2] == own and memo[3] == candidate.widths:
            return int(memo[4])
        shared, local = self.shared.full, self.local.full
        for name, d in row.settled:
            if name in _SHARED:
                shared &= self.shared.mask(name, d, own)
            else:
                local &= self.local.mask(name, d)
        if len(self.local.fields["head_dim"]) > 1:
            by_width = self.local.value_mask["head_dim"]
            local &= sum(by_width.get(w, 0) for w in candidate.widths)
        mask = shared if local == self.local.full == 1 else shared * self._spread(local)
        row.memo = self.shared, self.local, own, candidate.widths, mask
        return mask

    def _spread(self, local: int) -> int:
        """One bit at the start of each local assignment in ``local``; times a shared mask gives their product."""
        return sum(1 << (i * self.width) for i in range(len(self.local.assignments)) if local >> i & 1)

    def project(self, mask: int) -> int:
        """Shared assignments for which some local assignment is left."""
        if len(self.local.assignments) == 1:
            return mask
        out = 0
        while mask:
            out |= mask & self.shared.full
            mask >>= self.width
        return out

    # rules

    def _rules(self, catalogs: Mapping[str, DeviceCatalog]) -> list[Rule]:
        """Constraints that could apply here: every role, fact and value they mention exists in this group."""
        devices = dict.fromkeys(str(j.device) for j in self.judges.values())
        rules = []
        for device in devices:
            for c in catalogs[device].constraints:
                rule = self._rule(c, device)
                if rule is not None:
                    rules.append(rule)
        return rules

    def _rule(self, c: Constraint, device: str) -> Rule | None:
        judge = next(j for j in self.judges.values() if str(j.device) == device)
        facts = judge.facts.of(None) if self.group else judge.facts.common
        conditions: list[dict[int, Domain]] = []
        masks: list[int] = []
        for side in (c.when, c.then):
            mask, on_roles = self.full, {}
            for name, d in side.items():
                if name in RELEVANT:
                    if name not in self.roles:
                        return None
                    if side is c.when and not any(x.spec.backend in d for x in self.candidates[name]):
                        return None  # it is about a backend that cannot be chosen
                    on_roles[self.roles.index(name)] = d
                elif FIELDS[name].settled:
                    universe = self.local if name in LOCAL else self.shared
                    if universe.fields[name] == (None,):
                        return None
                    mask &= self.domain_mask(name, d)
                elif name not in facts or (facts[name] is None and FIELDS[name].unknown_passes):
                    return None
                elif facts[name] not in d:
                    mask = 0
            conditions.append(on_roles)
            masks.append(mask)
        if not masks[0]:
            return None
        parts = tuple(i for i, role in enumerate(self.roles) if str(self.judges[role].device) == device)
        return Rule(c, parts, conditions[0], masks[0], conditions[1], masks[1])

    def rules_mask(self, picks: Sequence[Candidate]) -> int:
        mask = self.full
        for rule in self.rules:
            if rule.takes_part(picks):
                mask &= rule.mask(picks, self.full)
        return mask

    # combinations

    def combinations(self, only: Mapping[str, str] | None = None, *, few: bool = False) -> Iterator[Combination]:
        """Feasible combinations, best first. ``only`` restricts roles to one backend name (``uniform``).

        ``few``: not worth dropping dominated rows first, because only the first of them will be looked at.
        """
        lists = []
        for role in self.roles:
            rows = self.candidates[role]
            if only and role in only:
                rows = [c for c in rows if c.spec.backend == only[role]]
            lists.append(rows if few else self._undominated(role, rows))
        required = [r not in ACCOMPANYING for r in self.roles]
        masks = [self.masks[r] for r in self.roles]
        for head, tied in levels(lists, masks, required):
            possible = []
            for picks, mask in tied:
                if self.rules:
                    mask &= self.rules_mask(picks)
                if mask:
                    possible.append((_tail(picks), picks, mask))
            if len(possible) > 1:
                possible.sort(key=itemgetter(0))
            for tail, picks, mask in possible:
                yield Combination((*head, *tail), picks, mask, self.project(mask))

    @property
    def reach(self) -> int:
        """Shared assignments that some row of every role allows at the same local values: but for rules, exactly those
        that a combination reaches."""
        out = self.full
        for role in self.roles:
            out &= union(self.masks[role].values())
        return self.project(out)

    def frontier(
        self, within: int, only: Mapping[str, str] | None = None, *, first: bool = False
    ) -> list[tuple[int, Combination]]:
        """For every shared assignment ``within``, the first combination that allows it: disjoint masks, best first.

        ``first`` stops at the very first, enough where nothing else depends on which assignment it is.
        """
        covered, out = 0, []
        for combination in self.combinations(only, few=first):
            new = combination.shared & within & ~covered
            if new:
                out.append((new, combination))
                covered |= new
                if first or covered == within:
                    break
        return out

    @property
    def size(self) -> int:
        """Upper bound of the number of combinations."""
        return math.prod(len(c) for c in self.candidates.values())

    def _undominated(self, role: str, rows: list[Candidate]) -> list[Candidate]:
        """Drop a row when another is strictly better in (tier, rank), allows at least as much and is ruled alike.

        Such a row can be in no best combination: exchanging it improves the key before names are looked at.
        """
        masks = self.masks[role]
        kept: list[tuple[Candidate, int, tuple[Any, ...]]] = []
        for c in rows:
            mask, sig = masks[id(c)], self._signature(role, c)
            for k, beyond, k_sig in kept:
                if not mask & beyond and sig == k_sig and (k.tier > c.tier or (k.tier == c.tier and k.rank < c.rank)):
                    break
            else:
                kept.append((c, ~mask, sig))
        return [c for c, _, _ in kept]

    def _signature(self, role: str, c: Candidate) -> tuple[Any, ...]:
        if not self.rules:
            return ()
        i = self.roles.index(role)
        name = c.spec.backend
        return tuple(
            (
                r.constraint.plugin == c.spec.plugin,
                *(name in side[i] for side in (r.when_roles, r.then_roles) if i in side),
            )
            for r in self.rules
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """A constraint prepared for one group: role conditions by position, everything else as masks."""

    constraint: Constraint
    parts: tuple[int, ...]
    """Positions of roles that run on the constraint's device."""
    when_roles: Mapping[int, Domain]
    when: int
    then_roles: Mapping[int, Domain]
    then: int

    def takes_part(self, picks: Sequence[Candidate]) -> bool:
        return any(picks[i].spec.plugin == self.constraint.plugin for i in self.parts)

    def mask(self, picks: Sequence[Candidate], full: int) -> int:
        if any(picks[i].spec.backend not in d for i, d in self.when_roles.items()):
            return full
        holds = all(picks[i].spec.backend in d for i, d in self.then_roles.items())
        return full & ~self.when | (self.then if holds else 0)


def union(masks: Any) -> int:
    out = 0
    for m in masks:
        out |= m
    return out


def levels(
    lists: Sequence[Sequence[Candidate]], masks: Sequence[Mapping[int, int]], required: Sequence[bool]
) -> Iterator[tuple[Key, list[tuple[tuple[Candidate, ...], int]]]]:
    """All combinations of one candidate per list (each best first) whose masks have something in common: the heads of
    their keys in order, lazily, each with the combinations that share it, in any order.

    Rows equal in (tier, rank, padded) form a class; the key's first four parts grow along every list of classes, so
    a heap over class indices pops them in order. Most classes exclude each other (layouts), which their unions tell.
    """
    if not all(lists):
        return
    classes = [[list(g) for _, g in groupby(rows, key=_class)] for rows in lists]
    unions = [[union(mask[id(c)] for c in cls) for cls in of] for of, mask in zip(classes, masks)]
    start = (0,) * len(lists)
    heap = [(_head([c[0][0] for c in classes], required), start)]
    seen = {start}
    while heap:
        head, level = heap[0][0], []
        while heap and heap[0][0] == head:
            index = heapq.heappop(heap)[1]
            level.append(index)
            for r in range(len(index)):
                if index[r] + 1 < len(classes[r]):
                    after = (*index[:r], index[r] + 1, *index[r + 1 :])
                    if after not in seen:
                        seen.add(after)
                        heapq.heappush(heap, (_head([c[i][0] for c, i in zip(classes, after)], required), after))
        tied: list[tuple[tuple[Candidate, ...], int]] = []
        for index in level:
            common = -1
            for of, i in zip(unions, index):
                common &= of[i]
            if common:
                found: list[tuple[tuple[Candidate, ...], int]] = [((), common)]
                for of_role, i, mask in zip(classes, index, masks):
                    found = [((*picks, c), left) for picks, m in found for c in of_role[i] if (left := m & mask[id(c)])]
                tied += found
        if tied:
            yield head, tied


def _preference(c: Candidate) -> tuple[int, int, int, int]:
    return (-c.tier, c.rank, c.padded, c.row.index)


def _class(c: Candidate) -> tuple[int, int, int]:
    return (-c.tier, c.rank, c.padded)


def _head(picks: Sequence[Candidate], required: Sequence[bool]) -> Key:
    """Tiers of required roles, weakest first; of accompanying roles; ranks; padded columns. Smaller is better."""
    return (
        tuple(sorted((-c.tier for c, r in zip(picks, required) if r), reverse=True)),
        tuple(sorted((-c.tier for c, r in zip(picks, required) if not r), reverse=True)),
        sum(c.rank for c in picks),
        sum(c.padded for c in picks),
    )


def _tail(picks: Sequence[Candidate]) -> Key:
    """Whether prefill and decode differ, then names and content."""
    names = {c.spec.backend for c in picks if c.spec.role in ("prefill", "decode")}
    return (int(len(names) > 1), tuple((c.spec.backend, c.row.index, c.widths) for c in picks))


def merge(keys: Sequence[Key]) -> Key:
    """The key of several groups together: tiers pooled, sums added, names in group order."""
    return (
        tuple(sorted((t for k in keys for t in k[0]), reverse=True)),
        tuple(sorted((t for k in keys for t in k[1]), reverse=True)),
        sum(k[2] for k in keys),
        sum(k[3] for k in keys),
        sum(k[4] for k in keys),
        tuple(k[5] for k in keys),
    )
