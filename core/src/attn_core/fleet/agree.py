"""From what all ranks said to one decision: compare what must be equal, name who differs, resolve each kind once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.errors import BadInputError
from attn_core.fleet import about
from attn_core.fleet import roles as words
from attn_core.fleet.about import WIRE, FleetError
from attn_core.fleet.decision import FleetDecision, Kind
from attn_core.fleet.ranks import Ranks
from attn_core.platform import installed_plugins
from attn_core.plugins import Plugins
from attn_core.resolve.joint import Member, resolve_jointly
from attn_core.spec import Device, EngineOptions, ModelSpec
from attn_core.spec.decision import canonical_json

_MUST_SAY = ("asks", "device", "roles", "plugins", "packages", "impostors", "lacking", "unusable")


def decide(
    said: Sequence[Mapping[str, Any] | str],
    model: Any,
    *,
    ranks: Sequence[int] | None = None,
    plugins: Plugins | None = None,
    tolerate: bool = False,
    **options: Any,
) -> FleetDecision:
    """One decision for all ranks; ``said[i]`` is what :func:`describe` gave on rank ``i``, or ``ranks[i]``: a dict, or
    its JSON text.

    ``model`` and ``options`` must be those that the ranks described themselves with. Each distinct kind is judged
    once, with this process's ``plugins``. ``tolerate`` accepts plugins that only some ranks have, and packages that
    differ between ranks with equal devices: both become facts of their kind. What a plugin declares for a device must
    be the same here and there in any case.

    Raises :class:`FleetError` naming the ranks that failed or differ, :class:`NoBackendError` naming the ranks that
    stand in the way.
    """
    spec, engine = ModelSpec.of(model), EngineOptions.of(**options)
    distinct = heard(said, ranks)
    _check_equal(distinct, about.question_digest(spec, engine), tolerate)
    plugins = plugins or installed_plugins()
    parts = [_part(d, plugins, tolerate) for d in distinct]
    return solve(parts, spec, engine)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Ranks that are alike: one kind, before it is decided."""

    ranks: Ranks
    device: Device
    catalog: Catalog
    installed: Installed
    words: frozenset[str] | None
    """Of ``prefill``, ``decode``, ``encode``; None for all."""

    @property
    def where(self) -> str:
        return f"{self.ranks} ({self.device})"


def solve(parts: Sequence[Part], model: ModelSpec, options: EngineOptions) -> FleetDecision:
    """Decide for kinds. They are put in an order made of content only, so the numbering of ranks chooses nothing."""
    parts = sorted(parts, key=_content)
    asked = words.asked([p.words for p in parts], model)
    members = [
        Member(where=p.where, device=p.device, catalog=p.catalog, installed=p.installed, roles=r)
        for p, r in zip(parts, asked)
    ]
    decisions = resolve_jointly(members, model, options)
    kinds = [
        Kind(ranks=p.ranks, roles=None if r is None else tuple(sorted(r)), decision=d)
        for p, r, d in zip(parts, asked, decisions)
    ]
    return FleetDecision(kinds=tuple(sorted(kinds, key=lambda k: k.ranks.spans)))


def _content(p: Part) -> tuple[Any, ...]:
    i = p.installed
    packages = [sorted(m.items()) for m in (i.versions, i.impostors, i.lacking, i.unusable)]
    return canonical_json(p.device.to_json()), sorted(p.words or ()), packages, sorted(i.without), p.ranks.spans


# what ranks said


def heard(said: Sequence[Mapping[str, Any] | str], ranks: Sequence[int] | None = None) -> list[Said]:
    """Each distinct description once; raises :class:`FleetError` for ranks that failed or cannot be understood."""
    distinct = _distinct(said, range(len(said)) if ranks is None else ranks)
    _check_words(distinct)
    return distinct


@dataclass(frozen=True)
class Said:
    """One distinct description, and everybody who gave it."""

    ranks: Ranks
    data: Mapping[str, Any]


def _distinct(said: Sequence[Mapping[str, Any] | str], numbers: Sequence[int]) -> list[Said]:
    """Equal descriptions once; texts are compared before they are read."""
    if not said:
        raise BadInputError("a fleet needs at least one rank; nobody described itself")
    ranks: dict[str, list[int]] = {}
    if len(set(numbers)) != len(said):
        raise BadInputError(f"{len(said)} descriptions need as many different ranks, got {len(set(numbers))}")
    for rank, one in zip(numbers, said):
        ranks.setdefault(one if isinstance(one, str) else canonical_json(one), []).append(rank)
    out: dict[str, tuple[list[int], Any]] = {}
    for text, who in ranks.items():
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise FleetError(f"{Ranks.of(who)} sent {text[:40]!r}, not a description of a rank", who)
        out.setdefault(canonical_json(data), ([], data))[0].extend(who)
    return [Said(Ranks.of(who), data) for who, data in out.values()]


def _check_words(distinct: Sequence[Said]) -> None:
    """Readable at all: wire format, version, no failure, all fields. In this order, so that the first cause is told."""
    mine = about.version()
    lines: dict[str, Ranks] = {}
    for s in distinct:
        wire, version = s.data.get("wire"), s.data.get("attn_core")
        missing = [f for f in _MUST_SAY if f not in s.data]
        if version != mine or wire != WIRE:
            lines[
                f"{s.ranks} runs attn-core {version} (wire format {wire}); here is {mine} (wire format {WIRE}). "
                "Install one version on all ranks"
            ] = s.ranks
        elif s.data.get("error"):
            lines[f"{s.ranks} failed: {s.data['error']}"] = s.ranks
        elif missing:
            lines[f"{s.ranks} said nothing of {', '.join(missing)}"] = s.ranks
        else:
            words.check(str(s.ranks), s.data["roles"])
    if lines:
        raise FleetError("; ".join(lines), [r for ranks in lines.values() for r in ranks])


def _check_equal(distinct: Sequence[Said], asks: str, tolerate: bool) -> None:
    others = [s for s in distinct if s.data["asks"] != asks]
    if others:
        who = Ranks.of(r for s in others for r in s.ranks)
        raise FleetError(f"{who} asks another question: the model or the options differ from those given here", [*who])
    found: list[tuple[str, Ranks]] = []
    if not tolerate:
        for name in sorted({n for s in distinct for n in s.data["plugins"]}):
            found += _odd(f"plugin {name}", [(s, _plugin(s.data["plugins"].get(name))) for s in distinct])
        for device in sorted({_name(s) for s in distinct}):
            alike = [s for s in distinct if _name(s) == device]
            for package in sorted({p for s in alike for p in s.data["packages"]}):
                found += _odd(package, [(s, s.data["packages"].get(package)) for s in alike], device)
    if found:
        ranks = [r for _, who in found for r in who]
        text = "; ".join(line for line, _ in found)
        raise FleetError(
            f"{text}. Install the same everywhere, or tolerate=True makes packages and absent plugins facts of their "
            "kind of ranks",
            sorted(set(ranks)),
        )


def _odd(what: str, has: Sequence[tuple[Said, str | None]], device: str = "") -> list[tuple[str, Ranks]]:
    """Who differs from what most ranks have (of equally many, from what the lowest rank has), in words."""
    by_value: dict[str | None, list[int]] = {}
    for s, value in has:
        by_value.setdefault(value, []).extend(s.ranks)
    if len(by_value) < 2:
        return []
    counts = Counter({v: len(r) for v, r in by_value.items()})
    usual = min(by_value, key=lambda v: (-counts[v], min(by_value[v])))
    rest = f"the other {device} ranks" if device else "the others"
    return [
        (f"{who} {'has' if len(who) == 1 else 'have'} {_shown(what, value)}, {rest} {_shown(what, usual)}", who)
        for value, ranks in by_value.items()
        if value != usual
        for who in [Ranks.of(ranks)]
    ]


def _shown(what: str, value: str | None) -> str:
    if value is None:
        return f"no {what}"
    return f"{what} {value}".rstrip() if value else f"{what} of unknown version"


def _plugin(data: Mapping[str, Any] | None) -> str | None:
    """What must be equal of a plugin: which, and whether it works. Where it finds no device it is absent, and works."""
    if data is None:
        return None
    state = "" if data["works"] else f" {data['status']} ({data['error']})"
    return f"{data['dist']} {data['version']}{state}".strip() or "in-process"


def _name(s: Said) -> str:
    return f"{s.data['device']['platform']}:{s.data['device']['arch']}"


def _part(s: Said, plugins: Plugins, tolerate: bool) -> Part:
    """What the plugins here declare for a device there, once it is known to be what they declare there."""
    device = about.device_of(s.data)
    whole = plugins.catalog((device,))
    declared = whole.devices[str(device)]
    there = {n: p for n, p in s.data["plugins"].items() if p["works"]}
    here = {r.name for r in whole.reports if r.status in ("ok", "absent")}
    wrong = [n for n in sorted(here & there.keys()) if about.declares(declared, n) != there[n]["declares"]]
    wrong += [n for n in sorted(there.keys() - here) if there[n]["declares"] != _NOTHING]
    if wrong:
        versions = ", ".join(f"{n} {there[n]['version']}".strip() for n in wrong)
        raise FleetError(
            f"{s.ranks} ({device}): plugin {versions} declares other things there than in the process that decides; "
            "install the same build on all ranks",
            [*s.ranks],
        )
    if tolerate:
        declared = DeviceCatalog(
            tuple(b for b in declared.backends if b.plugin in there),
            tuple(c for c in declared.constraints if c.plugin in there),
        )
    catalog = Catalog({str(device): declared}, whole.reports)
    return Part(
        ranks=s.ranks, device=device, catalog=catalog, installed=about.installed_of(s.data),
        words=words.check(str(s.ranks), s.data["roles"]),
    )  # fmt: skip


_NOTHING = about.declares(DeviceCatalog(()), "")
