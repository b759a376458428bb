"""Step 3's end: from the winning combinations and the values still open to a Decision that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from attn_core.resolve.combine import Combination, GroupSpace, Key, Universe, union
from attn_core.resolve.judge import Candidate, Raw, Rejections
from attn_core.spec import Choice, Decision, GroupDecision, Rejection, Tier
from attn_core.spec.fields import CLAIMS, LOCAL, SHARED
from attn_core.spec.model import AttentionSpec

if TYPE_CHECKING:
    from attn_core.resolve import Problem

SPEAKING = ("decode", "prefill", "encode")


class Part(NamedTuple):
    """One problem, and the combination chosen in each of its spaces."""

    problem: Problem
    chosen: Sequence[Combination]
    where: str = ""
    """Which ranks it speaks for, where there are several kinds."""


class Settled(NamedTuple):
    """Shared values of a problem, why, and the assignment (a bit of its universe) that they are."""

    values: Mapping[str, Any]
    because: Mapping[str, tuple[str, ...]]
    bit: int


def decision(problem: Problem, key: Key, chosen: Sequence[Combination], mask: int) -> Decision:
    part = Part(problem, chosen)
    return decided(part, settle_shared([part], mask)[0], {}, lambda: _outside(part))


def decided(
    part: Part, settled: Settled, fixed: Mapping[str, Mapping[str, Any]], outside: Callable[[], Sequence[int]]
) -> Decision:
    """One problem's Decision: ``fixed`` are values of groups that were settled with other problems, ``outside`` tells
    what everything else allows each space, over its local x shared assignments, if anyone reads the rejections."""
    problem, chosen, _ = part
    shared, because = settled.values, dict(settled.because)
    eligible: dict[str, tuple[str, ...]] = {}
    groups: dict[str, GroupDecision] = {}
    roles: dict[str, Choice] = {}
    for space, combination in zip(problem.spaces, chosen):
        if space.group is None:
            roles = {r: _choice(c, None) for r, c in zip(space.roles, combination.picks)}
            continue
        values = _settle_local(space, combination, settled.bit, fixed.get(space.name, {}), because)
        width = values.get("head_dim")
        choices = {r: _choice(c, width) for r, c in zip(space.roles, combination.picks)}
        groups[space.name] = GroupDecision(choices=choices, values=values)
        eligible.update(_others(space, combination))
    layouts = {g.values["kv_layout"] for g in groups.values() if "kv_layout" in g.values}
    values = {n: v for n, v in shared.items() if v is not None}
    if len(layouts) == 1:
        values["kv_layout"] = layouts.pop()
    return Decision(
        devices=problem.devices,
        model=problem.model,
        options=problem.options,
        groups=groups,
        roles=roles,
        values=values,
        because=because,
        eligible=eligible,
        rejections=Rejections(lambda: _all_reasons(part, outside())),
        plugins=problem.catalog.reports,
        versions=_versions(problem),
    )


def _choice(c: Candidate, width: int | None) -> Choice:
    """``width`` is the group's settled kernel width: writers take it, MLA rows keep theirs. Remembered on the row."""
    row, kernel = c.row, width if c.spec.role == "kv_write" else c.widths[0]
    key = (kernel, c.native_width, c.num_heads)
    known, choice = row.choice
    if choice is None or known != key:
        s = row.spec
        choice = Choice(
            backend=s.backend,
            plugin=s.plugin,
            platform=s.platform,
            tier=Tier(s.tier),
            rank=s.rank,
            form=s.form,
            head_dim=kernel,
            padded_from=None if c.native_width in (None, kernel) else c.native_width,
            num_heads=c.num_heads,
            unified=s.unified,
            claims=frozenset(n for n in CLAIMS if s.claims(n)),
            variants=dict(s.variants),
            bind=s.bind,
            evidence=s.evidence,
        )
        row.choice = key, choice
    return choice


def settle_shared(parts: Sequence[Part], mask: int) -> list[Settled]:
    """Choose among the assignments left, field by field, each by its order of preference; one answer per part.

    Parts whose universes are one object share every field. Where they are views of one, a field that each view has
    for itself (the graph mode of a side) is settled by those who see it, all others by everyone.
    """
    sides: dict[Universe, list[Part]] = {}
    for part in parts:
        sides.setdefault(part.problem.shared, []).append(part)
    values: dict[Universe, dict[str, Any]] = {u: {} for u in sides}
    because: dict[Universe, dict[str, tuple[str, ...]]] = {u: {} for u in sides}
    for name in SHARED:
        together: dict[int, list[Universe]] = {}
        for universe in sides:
            together.setdefault(id(universe.value_mask[name]), []).append(universe)
        for universes in together.values():
            speaking = [part for u in universes for part in sides[u]]
            value, why = _settle(name, universes[0].allowed(name, mask), speaking)
            mask &= universes[0].value_mask[name][value]
            for u in universes:
                values[u][name] = value
                if value is not None:
                    because[u][name] = why
    return [Settled(values[p.problem.shared], because[p.problem.shared], mask.bit_length() - 1) for p in parts]


def _settle(name: str, allowed: tuple[Any, ...], parts: Sequence[Part]) -> tuple[Any, tuple[str, ...]]:
    """The preferred one of the values left, and why."""
    problem = parts[0].problem
    if getattr(problem.options, name) is not None:
        return allowed[0], ("pinned by the engine",)
    if allowed[0] is None:
        return None, ()
    value, why = _preferred(problem, _speakers(parts), name, allowed)
    if len(allowed) > 1:
        why.append(f"also possible: {', '.join(str(a) for a in allowed if a != value)}")
    return value, tuple(why)


class _Speaker(NamedTuple):
    role: str
    candidate: Candidate
    group: str
    where: str

    def __str__(self) -> str:
        place = f"{self.group} {self.role}" if self.group else self.role
        return f"{place} of {self.where}" if self.where else place


def _preferred(
    problem: Problem, speakers: Sequence[_Speaker], name: str, allowed: tuple[Any, ...]
) -> tuple[Any, list[str]]:
    """Decode speaks first, then prefill, encode, others; silence means the vocabulary's own order.

    A cache is never quantised unasked: where the model's own dtype is possible it comes first.
    """
    if name == "kv_cache_dtype":
        own = [d for d in allowed if d == "auto" or d in {g.dtype for g in problem.groups.values() if g.cached}]
        if own:
            return own[0], ["the model's own dtype"]
    for speaker in speakers:
        c = speaker.candidate
        domain = c.spec.accepts.get(name)
        if domain is not None and domain.values is not None:
            spoken = [v for v in domain.values if v in allowed]
            if spoken:
                return spoken[0], [f"{c.spec.backend} ({speaker}) prefers {domain}"]
    return allowed[0], ["no backend prefers another; the usual order of attn-core"]


def _speakers(parts: Sequence[Part]) -> list[_Speaker]:
    order = {r: i for i, r in enumerate(SPEAKING)}
    return sorted(
        (
            _Speaker(role, c, space.name, where)
            for problem, chosen, where in parts
            for space, combination in zip(problem.spaces, chosen)
            for role, c in zip(space.roles, combination.picks)
        ),
        key=lambda s: order.get(s.role, len(order)),
    )


def locals_left(space: GroupSpace, combination: Combination, bit: int) -> int:
    """Local assignments that a combination allows beside one shared assignment."""
    return sum(1 << i for i in range(len(space.local.assignments)) if combination.mask >> (i * space.width + bit) & 1)


def speaking_order(space: GroupSpace, combination: Combination) -> list[tuple[str, Candidate]]:
    return sorted(zip(space.roles, combination.picks), key=lambda p: (*SPEAKING, p[0]).index(p[0]))


def preferred_local(name: str, allowed: tuple[Any, ...], picks: Sequence[tuple[str, Candidate]]) -> Any:
    """The narrowest width; a layout or a query form by preference."""
    if len(allowed) == 1 or name == "head_dim":
        return allowed[0]
    spoken = [v for _, c in picks if name in c.spec.accepts for v in c.spec.accepts[name].values or () if v in allowed]
    return spoken[0] if spoken else _plain_first(name, allowed)


def _settle_local(
    space: GroupSpace,
    combination: Combination,
    bit: int,
    fixed: Mapping[str, Any],
    because: dict[str, tuple[str, ...]],
) -> dict[str, Any]:
    """Narrowest common width, then layout and query form by preference, among what the shared values leave."""
    mask = locals_left(space, combination, bit)
    picks = speaking_order(space, combination)
    out: dict[str, Any] = {}
    for name in LOCAL_ORDER:
        value = fixed[name] if name in fixed else preferred_local(name, space.local.allowed(name, mask), picks)
        mask &= space.local.value_mask[name][value]
        if value is not None:
            out[name] = value
    group = space.group
    if isinstance(group, AttentionSpec):
        out["scale"] = group.softmax_scale
        if out.get("head_dim", group.head_dim) != group.head_dim:
            because[f"{space.name}.head_dim"] = (
                f"padded with zeros from {group.head_dim} to {out['head_dim']}, the narrowest width "
                f"{' and '.join(dict.fromkeys(c.spec.backend for _, c in picks if c.spec.pads))} can run; "
                f"scale stays that of {group.head_dim}",
            )
    if "mla_query" in out and not any(c.spec.form == "absorbed" for _, c in picks):
        del out["mla_query"]
    return out


LOCAL_ORDER = ("head_dim", *(n for n in LOCAL if n != "head_dim"))


def _plain_first(name: str, allowed: tuple[Any, ...]) -> Any:
    plain = {"kv_layout": "NHD", "mla_query": "packed"}[name]
    return plain if plain in allowed else allowed[0]


def _others(space: GroupSpace, combination: Combination) -> Iterator[tuple[str, tuple[str, ...]]]:
    """``group.role`` -> the other backends that could have served, best first."""
    for role, c in zip(space.roles, combination.picks):
        names = dict.fromkeys(o.spec.backend for o in space.candidates[role])
        names.pop(c.spec.backend, None)
        yield f"{space.name}.{role}", tuple(names)


def _all_reasons(part: Part, outside: Sequence[int]) -> Iterator[Rejection]:
    for raw in (*part.problem.reasons(), *_near_misses(part, outside)):
        yield raw.rejection()


def _outside(part: Part) -> list[int]:
    """For each space, the assignments that the choices in the other spaces allow."""
    out = []
    for i, space in enumerate(part.problem.spaces):
        rest = part.problem.shared.full
        for other in (*part.chosen[:i], *part.chosen[i + 1 :]):
            rest &= other.shared
        out.append(space.ones * rest)
    return out


def _near_misses(part: Part, outside: Sequence[int]) -> Iterator[Raw]:
    """Eligible rows of a better tier that lost: they cannot share the values with the rest."""
    for space, combination, rest in zip(part.problem.spaces, part.chosen, outside):
        for role, c in zip(space.roles, combination.picks):
            better = list(takewhile(lambda o: o.tier > c.tier, space.candidates[role]))  # noqa: B023 - used at once
            if better:
                others = space.full & rest
                for r, pick in zip(space.roles, combination.picks):
                    others &= space.full if r == role else space.masks[r][id(pick)]
                for o in better:
                    yield Raw("conflict", o.row, space.name, *disagreement(space, space.masks[role][id(o)], others))


def conflict_text(
    problem: Problem, space: GroupSpace, role: str, c: Candidate, *, within: bool
) -> tuple[str, str, str] | None:
    """Why a live row has nothing to be combined with: (field, what it needs, what another party allows).

    ``within``: parties are the group's other roles, else the other groups. None when it agrees with each of them.
    """
    mine = space.masks[role][id(c)]
    if within:
        parties = {r: union(space.masks[r].values()) for r in space.roles if r != role}
    else:
        parties = {s.name: space.ones * s.reach for s in problem.spaces if s is not space}
    for party, theirs in parties.items():
        if not mine & theirs:
            return disagreement(space, mine, theirs, party)
    if not within:
        return None
    joint = mine
    for theirs in parties.values():
        joint &= theirs
    return disagreement(space, mine, joint)  # each pair agrees: it is all of them together, or a rule


def disagreement(space: GroupSpace, mine: int, others: int, party: str = "") -> tuple[str, str, str]:
    who = f"{party} allows" if party else "the others allow"
    for name in (*SHARED, *LOCAL, "head_dim"):
        a, b = space.allowed(name, mine), space.allowed(name, others)
        if not set(a) & set(b):
            return name, f"it needs {listed(a)}", f"{who} {listed(b)}"
    if not mine & others:
        return "values", "each value is possible by itself", "no combination of them is"
    for rule in space.rules:
        return rule.constraint.name, "it cannot be combined", rule.constraint.because
    return "combination", "it fits", "another combination is better at its weakest role"


def listed(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return f"{shown}, ..." if len(values) > 6 else shown or "nothing"


def _versions(problem: Problem) -> dict[str, str]:
    """The devices' toolkits and every package found that some row asks for: what a replay must take as installed."""
    out: dict[str, str] = {}
    for device in problem.devices.values():
        out.update(device.versions)
        catalog = problem.catalog.devices[str(device)]
        for plugin, requirement in catalog.requirements:
            found = problem.installed.version(requirement, catalog.written_for.get(plugin, {}))
            if found is not None:
                out.setdefault(requirement.name, found)
    return out
