"""No answer for a fleet: which ranks stand in the way, in every reason, and what leaving them out would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_core.errors import BadInputError, NoBackendError
from attn_core.resolve import refuse, settle
from attn_core.resolve.combine import union
from attn_core.resolve.judge import Raw, Rejections
from attn_core.spec import Decision, Rejection
from attn_core.spec.fields import SHARED

if TYPE_CHECKING:
    from attn_core.resolve import Problem
    from attn_core.resolve.joint import Joint


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRejection(Rejection):
    """A reason, and the ranks it holds for."""

    ranks: str
    """``ranks 3, 17 and 40 more (rocm:gfx942)``"""

    @classmethod
    def of(cls, r: Rejection, ranks: str) -> RankRejection:
        return cls(
            code=r.code, backend=r.backend, role=r.role, group=r.group, field=r.field, got=r.got, allowed=r.allowed,
            plugin=r.plugin, hint=r.hint, row=r.row, ranks=ranks,
        )  # fmt: skip

    @property
    def text(self) -> str:
        return f"{Rejection.text.fget(self)}; {self.ranks}"  # type: ignore[attr-defined]

    def to_json(self) -> dict[str, Any]:
        return {**Rejection.to_json(self), "ranks": self.ranks}


def no_joint(joint: Joint) -> NoBackendError:
    """Kinds that nothing serves even alone; else the values that they cannot agree on."""
    alone = [i for i, p in enumerate(joint.problems) if p.solve() is None]
    lines: list[str] = []
    reasons: list[Rejection] = []
    for i in alone:
        found, raws = refuse.findings(joint.problems[i])
        lines += [f"{joint.members[i].where}: {line}" for line in found]
        reasons += _marked(raws, joint.members[i].where)
    if not alone:
        lines = list(_disagreements(joint)) or [_NO_SINGLE]
        for i, problem in enumerate(joint.problems):
            reasons += _marked((*problem.reasons(), *_conflicts(joint, i)), joint.members[i].where)
    return _error("no_backend", joint, lines, reasons, tuple(_relaxations(joint)))


_NO_SINGLE = (
    "every kind of ranks can be served by itself and each value is possible everywhere, but no combination of "
    "page size, cache dtype, layout, width, graph mode and collectives suits all of them"
)


def check_references(joint: Joint, decisions: Sequence[Decision]) -> None:
    """As :func:`refuse.check_reference`, for every kind of ranks."""
    lines, reasons = list[str](), list[Rejection]()
    for member, problem, decision in zip(joint.members, joint.problems, decisions):
        found = refuse.poor(problem, decision)
        lines += [f"{member.where}: {line}" for line in found]
        if found:
            reasons += _marked(problem.reasons(), member.where)
    if lines:
        raise _error("reference_only", joint, lines, reasons, (*_relaxations(joint), refuse.ACCEPT))


def _error(
    code: str, joint: Joint, lines: list[str], reasons: list[Rejection], relaxations: tuple[str, ...]
) -> NoBackendError:
    rejections = Rejections(lambda: reasons)
    return NoBackendError(code, refuse.text(joint.model, lines, rejections, relaxations), rejections, relaxations)


def _marked(raws: Sequence[Raw], where: str) -> list[Rejection]:
    return [RankRejection.of(raw.rejection(), where) for raw in raws]


def _able(problem: Problem) -> list[int]:
    """For each space, the local x shared assignments that some combination allows together with the other spaces."""
    masks = [union(c.mask for c in space.combinations()) for space in problem.spaces]
    together = problem.shared.full
    for space, mask in zip(problem.spaces, masks):
        together &= space.project(mask)
    return [mask & space.ones * together for space, mask in zip(problem.spaces, masks)]


def _disagreements(joint: Joint) -> Iterator[str]:
    """One line per value that every kind can take in some way, but not all in the same."""
    able = [dict(zip((s.name for s in p.spaces), _able(p))) for p in joint.problems]
    for name in SHARED:
        for roles in dict.fromkeys(m.roles for m in joint.members):
            mine = [i for i, m in enumerate(joint.members) if name != "graph" or m.roles == roles]
            allowed = [_values(joint.problems[i], name, able[i]) for i in mine]
            if not set.intersection(*map(set, allowed)):
                yield f"{name}: " + "; ".join(
                    f"{joint.members[i].where} can take {settle.listed(a)}" for i, a in zip(mine, allowed)
                )
                break
    for space in joint.spaces:
        for name in space.same:
            allowed = [s.allowed(name, able[i][space.name]) for i, s in zip(space.members, space.spaces)]
            if not set.intersection(*map(set, allowed)):
                yield f"{name} of group {space.name}: " + "; ".join(
                    f"{joint.members[i].where} can take {settle.listed(a)}" for i, a in zip(space.members, allowed)
                )


def _values(problem: Problem, name: str, able: dict[str, int]) -> tuple[Any, ...]:
    mask = problem.shared.full
    for space in problem.spaces:
        mask &= space.project(able[space.name])
    return problem.shared.allowed(name, mask)


def _conflicts(joint: Joint, member: int) -> Iterator[Raw]:
    """One reason per live row that no rank of some other kind can meet."""
    for space in joint.spaces:
        if member not in space.members or space.spaces[0].group is None:
            continue
        own = space.spaces[space.members.index(member)]
        for other, theirs in zip(space.members, space.spaces):
            if other == member:
                continue
            reach = space.reach_of(theirs)
            for role in own.roles:
                for c in own.candidates[role]:
                    mine = own.masks[role][id(c)]
                    if not mine & reach:
                        party = joint.members[other].where
                        yield Raw("conflict", c.row, own.name, *settle.disagreement(own, mine, reach, party))


def _relaxations(joint: Joint) -> Iterator[str]:
    """What leaving out each kind of ranks, then taking back each pin, would give."""
    from attn_core.resolve.joint import Joint as Again

    members = joint.members
    trials: list[tuple[str, Any, Any]] = []
    sides = [m.roles for m in members]
    for m in members if len(members) > 1 else ():
        if sides.count(m.roles) > 1:
            trials.append((f"without {m.where}", [o for o in members if o is not m], joint.options))
    for name, value in joint.options.pins().items():
        if name != "allow_reference":
            trials.append((f"without {name}={refuse.shown(value)}", members, joint.options.without(name)))
    for what, left, options in trials:
        try:
            again = Again(left, joint.model, options)
        except BadInputError:
            continue
        best = again.solve()
        if best is not None:
            decisions = again.decisions(*best)
            if not any(refuse.poor(p, d) for p, d in zip(again.problems, decisions)):
                yield f"{what}: {'; '.join(dict.fromkeys(map(refuse.summary, decisions)))}"


__all__ = ["RankRejection", "check_references", "no_joint"]
