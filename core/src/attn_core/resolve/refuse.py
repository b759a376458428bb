"""Step 4: no answer, or an answer nobody would want: errors with every reason and what each pin costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from attn_core.errors import BadInputError, NoBackendError
from attn_core.explain import grouped
from attn_core.resolve.judge import Raw, Rejections
from attn_core.resolve.settle import conflict_text
from attn_core.spec import ACCOMPANYING, Decision, ModelSpec, Rejection, Tier
from attn_core.spec.check import nearest
from attn_core.spec.fields import SHARED

if TYPE_CHECKING:
    from attn_core.resolve import Problem
    from attn_core.resolve.combine import GroupSpace

ACCEPT = "allow_reference=True accepts the reference backend"
_CURABLE = frozenset({"package", "version", "pin", "denied"})
"""Reasons the user can take away; a better backend that failed only for these must not be replaced by a reference."""


def no_backend(problem: Problem) -> NoBackendError:
    """Why nothing fits, and what taking back each pin would give."""
    lines, reasons = findings(problem)
    rejections = Rejections(lambda: (r.rejection() for r in reasons))
    relaxations = tuple(_relaxations(problem))
    return NoBackendError("no_backend", text(problem.model, lines, rejections, relaxations), rejections, relaxations)


def findings(problem: Problem) -> tuple[list[str], list[Raw]]:
    """Why nothing fits: empty roles first, then conflicts inside a group, then conflicts between groups."""
    lines, reasons = list(_unknown_pins(problem)), problem.reasons()
    empty = [(s, r) for s in problem.spaces for r in s.roles if not s.candidates[r]]
    for space, role in empty:
        lines.append(f"no backend can {role} group {space.name} on {problem.device(role)}")
    if not empty:
        stuck = [s for s in problem.spaces if next(s.combinations(), None) is None]
        for space in stuck or problem.spaces:
            reasons += _conflicts(problem, space, alone=bool(stuck))
        if stuck:
            lines += [f"the backends of group {s.name} cannot be combined" for s in stuck]
        elif problem.options.uniform != "none":
            lines.append(f"no choice of backends is the same everywhere, as uniform={problem.options.uniform!r} asks")
        else:
            lines.append("each group has backends, but they cannot share the values the groups have in common")
    return lines, reasons


def _unknown_pins(problem: Problem) -> Iterator[str]:
    """Pinned names that nobody offers here: most often a typing error, or a plugin that is not installed."""
    for space in problem.spaces:
        for role, judge in space.judges.items():
            rows = problem.catalog.devices[str(judge.device)].rows.get(role, ())
            names = sorted({row.spec.backend for row in rows})
            if judge.pinned is not None and judge.pinned not in names:
                yield (
                    f"no installed plugin offers backend {judge.pinned!r} to {role} on {judge.device}"
                    f"{nearest(judge.pinned, names)}; offered: {', '.join(names) or 'nothing'}"
                )


def _conflicts(problem: Problem, space: GroupSpace, *, alone: bool) -> Iterator[Raw]:
    """One reason per live row that cannot meet the others; ``alone``: inside its group, else between groups."""
    if space.group is None:
        return
    for role in space.roles:
        for c in space.candidates[role]:
            conflict = conflict_text(problem, space, role, c, within=alone)
            if conflict is not None:
                yield Raw("conflict", c.row, space.name, *conflict)


def check_reference(problem: Problem, decision: Decision) -> None:
    """Refuse a REFERENCE backend for a required role off the CPU when something curable kept a better one away.

    Not when the user named that backend or set ``allow_reference``; never for accompanying roles.
    """
    lines = poor(problem, decision)
    if lines:
        relaxations = (*_relaxations(problem), ACCEPT)
        rejections = Rejections(lambda: (r.rejection() for r in problem.reasons()))
        shown = text(problem.model, lines, rejections, relaxations)
        raise NoBackendError("reference_only", shown, rejections, relaxations)


def poor(problem: Problem, decision: Decision) -> list[str]:
    """One line per required role that would run on a reference although something curable kept a better one away."""
    options = problem.options
    lines: list[str] = []
    if options.allow_reference:
        return lines
    for name, group in decision.groups.items():
        for role, choice in group.choices.items():
            device = problem.device(role)
            if choice.tier != Tier.REFERENCE or role in ACCOMPANYING or device.platform == "cpu":
                continue
            if options.pinned_backend(name, role) == choice.backend:
                continue
            why = sorted(_curable(problem, name, role)) + _failed_plugins(problem)
            if why:
                lines.append(
                    f"group {name} {role} on {device} would run on {choice.backend}, a slow reference, "
                    f"because better ones are missing: {'; '.join(why)}"
                )
    return lines


def _curable(problem: Problem, group: str, role: str) -> set[str]:
    """Better rows of this role whose every reason the user can take away: ``name (reason)``."""
    against: dict[int, list[Raw]] = {}
    for raw in problem.reasons():
        if raw.group == group and raw.row.spec.role == role and raw.row.spec.tier > Tier.REFERENCE:
            against.setdefault(id(raw.row), []).append(raw)
    return {
        f"{raws[0].row.spec.backend} ({', '.join(dict.fromkeys(r.rejection().text for r in raws))})"
        for raws in against.values()
        if all(r.code in _CURABLE for r in raws)
    }


def _failed_plugins(problem: Problem) -> list[str]:
    failed = [r for r in problem.catalog.reports if r.status in ("failed", "incompatible")]
    return [f"plugin {r.name} {'failed' if r.status == 'failed' else 'is incompatible'} ({r.error})" for r in failed]


def _relaxations(problem: Problem) -> Iterator[str]:
    """What taking back each single pin would give."""
    from attn_core.resolve import Problem as Again
    from attn_core.resolve import settle

    for name, value in problem.options.pins().items():
        if name == "allow_reference":
            continue
        try:
            again = Again(
                problem.devices, problem.model, problem.options.without(name), problem.catalog, problem.installed
            )
        except BadInputError:
            continue
        best = again.solve()
        if best is not None:
            decision = settle.decision(again, *best)
            if poor(again, decision):
                continue
            yield f"without {name}={shown(value)}: {summary(decision)}"


def shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def summary(decision: Decision) -> str:
    parts = []
    for name, g in decision.groups.items():
        names = " / ".join(c.backend for r, c in g.choices.items() if r not in ACCOMPANYING)
        parts.append(f"{name} {names}" if len(decision.groups) > 1 else names)
    values = [f"{n.split('_')[0]} {decision.values[n]}" for n in reversed(SHARED) if n in decision.values]
    return ", ".join(parts + values[:1])


def text(model: ModelSpec, lines: list[str], rejections: Sequence[Rejection], relaxations: tuple[str, ...]) -> str:
    """Short enough to read in a terminal: headline, grouped reasons, ways out."""
    out = [f"{model.architecture or 'model'}: {line}" for line in _most(lines, 6)]
    out += grouped(rejections, most=36)
    if relaxations:
        out += ["ways out:", *(f"  - {r}" for r in _most(list(relaxations), 12))]
    return "\n".join(out)


def _most(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more"]
