"""Step 3's end: from the winning combinations and the values still open to a Decision that says why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from attn_core.resolve.combine import Combination, GroupSpace, Key, union
from attn_core.resolve.judge import Candidate, Raw, Rejections
from attn_core.spec import Choice, Decision, GroupDecision, Tier
from attn_core.spec.fields import CLAIMS, LOCAL, SHARED
from attn_core.spec.model import AttentionSpec

if TYPE_CHECKING:
    from attn_core.resolve import Problem

_SPEAKING = ("decode", "prefill", "encode")


def decision(problem: Problem, key: Key, chosen: Sequence[Combination], mask: int) -> Decision:
    because: dict[str, tuple[str, ...]] = {}
    shared, bit = _settle_shared(problem, chosen, mask, because)
    eligible: dict[str, tuple[str, ...]] = {}
    groups: dict[str, GroupDecision] = {}
    roles: dict[str, Choice] = {}
    for space, combination in zip(problem.spaces, chosen):
        if space.group is None:
            roles = {r: _choice(c, None) for r, c in zip(space.roles, combination.picks)}
            continue
        values = _settle_local(space, combination, bit, because)
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
        rejections=Rejections(lambda: [*problem.reasons(), *_near_misses(problem, chosen)]),
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


def _settle_shared(
    problem: Problem, chosen: Sequence[Combination], mask: int, because: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Any], int]:
    """Choose among the assignments left, field by field, each by its order of preference; values and their bit."""
    out: dict[str, Any] = {}
    speakers = _speakers(problem, chosen)
    for name in SHARED:
        allowed = problem.shared.allowed(name, mask)
        value, why = allowed[0], []
        if getattr(problem.options, name) is not None:
            why = ["pinned by the engine"]
        elif value is not None:
            value, why = _preferred(problem, speakers, name, allowed)
            if len(allowed) > 1:
                why.append(f"also possible: {', '.join(str(a) for a in allowed if a != value)}")
        mask &= problem.shared.value_mask[name][value]
        out[name] = value
        if value is not None:
            because[name] = tuple(why)
    return out, mask.bit_length() - 1


def _preferred(
    problem: Problem, speakers: Sequence[tuple[str, GroupSpace, Candidate]], name: str, allowed: tuple[Any, ...]
) -> tuple[Any, list[str]]:
    """Decode speaks first, then prefill, encode, others; silence means the vocabulary's own order.

    A cache is never quantised unasked: where the model's own dtype is possible it comes first.
    """
    if name == "kv_cache_dtype":
        own = [d for d in allowed if d == "auto" or d in {g.dtype for g in problem.groups.values() if g.cached}]
        if own:
            return own[0], ["the model's own dtype"]
    for role, space, c in speakers:
        domain = c.spec.accepts.get(name)
        if domain is not None and domain.values is not None:
            spoken = [v for v in domain.values if v in allowed]
            if spoken:
                where = f"{space.name} {role}" if space.name else role
                return spoken[0], [f"{c.spec.backend} ({where}) prefers {domain}"]
    return allowed[0], ["no backend prefers another; the usual order of attn-core"]


def _speakers(problem: Problem, chosen: Sequence[Combination]) -> list[tuple[str, GroupSpace, Candidate]]:
    order = {r: i for i, r in enumerate(_SPEAKING)}
    return sorted(
        (
            (role, space, c)
            for space, combination in zip(problem.spaces, chosen)
            for role, c in zip(space.roles, combination.picks)
        ),
        key=lambda s: order.get(s[0], len(order)),
    )


def _settle_local(
    space: GroupSpace, combination: Combination, bit: int, because: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Narrowest common width, then layout and query form by preference, among what the shared values leave."""
    mask = sum(1 << i for i in range(len(space.local.assignments)) if combination.mask >> (i * space.width + bit) & 1)
    picks = sorted(zip(space.roles, combination.picks), key=lambda p: (*_SPEAKING, p[0]).index(p[0]))
    out: dict[str, Any] = {}
    for name in LOCAL_ORDER:
        allowed = space.local.allowed(name, mask)
        value = allowed[0]
        if len(allowed) > 1 and name != "head_dim":
            spoken = [
                v for _, c in picks if name in c.spec.accepts for v in c.spec.accepts[name].values or () if v in allowed
            ]
            value = spoken[0] if spoken else _plain_first(name, allowed)
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


def _near_misses(problem: Problem, chosen: Sequence[Combination]) -> Iterator[Raw]:
    """Eligible rows of a better tier that lost: they cannot share the values with the rest."""
    for i, (space, combination) in enumerate(zip(problem.spaces, chosen)):
        rest = problem.shared.full
        for other in (*chosen[:i], *chosen[i + 1 :]):
            rest &= other.shared
        for role, c in zip(space.roles, combination.picks):
            better = list(takewhile(lambda o: o.tier > c.tier, space.candidates[role]))  # noqa: B023 - used at once
            if better:
                others = space.full & space.ones * rest
                for r, pick in zip(space.roles, combination.picks):
                    others &= space.full if r == role else space.masks[r][id(pick)]
                for o in better:
                    yield Raw("conflict", o.row, space.name, *_disagreement(space, space.masks[role][id(o)], others))


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
            return _disagreement(space, mine, theirs, party)
    if not within:
        return None
    joint = mine
    for theirs in parties.values():
        joint &= theirs
    return _disagreement(space, mine, joint)  # each pair agrees: it is all of them together, or a rule


def _disagreement(space: GroupSpace, mine: int, others: int, party: str = "") -> tuple[str, str, str]:
    who = f"{party} allows" if party else "the others allow"
    for name in (*SHARED, *LOCAL, "head_dim"):
        a, b = space.allowed(name, mine), space.allowed(name, others)
        if not set(a) & set(b):
            return name, f"it needs {_list(a)}", f"{who} {_list(b)}"
    if not mine & others:
        return "values", "each value is possible by itself", "no combination of them is"
    for rule in space.rules:
        return rule.constraint.name, "it cannot be combined", rule.constraint.because
    return "combination", "it fits", "another combination is better at its weakest role"


def _list(values: Sequence[Any]) -> str:
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
