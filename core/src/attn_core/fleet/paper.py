"""A fleet on paper: ``fleet.json`` to kinds of ranks, for hardware that need not be here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attn_core.errors import BadInputError
from attn_core.fleet import roles as words
from attn_core.fleet.agree import Part, solve
from attn_core.fleet.decision import FleetDecision
from attn_core.fleet.ranks import Ranks
from attn_core.platform import Platform, simulate
from attn_core.spec import EngineOptions, ModelSpec, check
from attn_core.spec.check import nearest
from attn_core.spec.decision import canonical_json

_KEYS = ("device", "count", "roles", "with", "without")
_EXPECTED = 'expected {"ranks": [{"device": "cuda:h200", "count": 8}, ...]}'


class PaperFleet:
    """Kinds of ranks, numbered in the order the file lists them."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts

    def resolve(self, model: Any, **options: Any) -> FleetDecision:
        """Decide for all ranks. Raises as :func:`attn_core.fleet.decide` does."""
        return solve(self.parts, ModelSpec.of(model), EngineOptions.of(**options))


def read(fleet: str | Path | Mapping[str, Any], *, platform: Callable[..., Platform] = simulate) -> PaperFleet:
    """Read a fleet from a file or a dict.

    ``{"ranks": [{"device": "cuda:h200", "count": 8, "roles": ["prefill"], "with": {"cuda": "12.8"}, "without": []}]}``:
    all but ``device`` may be left out. ``platform`` makes a simulated platform of a device and its packages.
    Raises :class:`BadInputError` naming the entry and what is allowed there.
    """
    data, where = _load(fleet)
    entries = data.get("ranks") if isinstance(data, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise BadInputError(f"{where}: no list of ranks; {_EXPECTED}")
    if unknown := [k for k in data if k != "ranks"]:
        raise BadInputError(f"{where}: unknown key {unknown[0]!r}; {_EXPECTED}")
    alike: dict[str, tuple[Mapping[str, Any], list[tuple[int, int]]]] = {}
    first = 0
    for i, entry in enumerate(entries):
        place = f"{where}, ranks[{i}]"
        _check(place, entry)
        count = check.size(place, "count", entry.get("count", 1))
        kind = {"roles": None, "with": {}, "without": [], **{k: v for k, v in entry.items() if k != "count"}}
        kind["roles"] = None if kind["roles"] is None else sorted(kind["roles"])
        kind["without"] = sorted(kind["without"])
        alike.setdefault(canonical_json(kind), (kind, []))[1].append((first, first + count - 1))
        first += count
    return PaperFleet(tuple(_part(kind, spans, platform) for kind, spans in alike.values()))


def _load(fleet: str | Path | Mapping[str, Any]) -> tuple[Any, str]:
    if isinstance(fleet, Mapping):
        return fleet, "fleet"
    try:
        return json.loads(Path(fleet).read_text(encoding="utf-8")), str(fleet)
    except OSError as e:
        raise BadInputError(f"{fleet}: cannot be read: {e.strerror or e}; {_EXPECTED}") from None
    except (ValueError, RecursionError) as e:
        raise BadInputError(f"{fleet}: is not JSON ({e}); {_EXPECTED}") from None


def _check(place: str, entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise BadInputError(f"{place}: is {type(entry).__name__}, not an object; {_EXPECTED}")
    if unknown := [k for k in entry if k not in _KEYS]:
        raise BadInputError(
            f"{place}: unknown key {unknown[0]!r}{nearest(unknown[0], _KEYS)}; keys: {', '.join(_KEYS)}"
        )
    if not isinstance(entry.get("device"), str):
        raise BadInputError(f'{place}: device={entry.get("device")!r} must be text such as "cuda:h200"')
    words.check(place, entry.get("roles"))
    versions, without = entry.get("with", {}), entry.get("without", [])
    if not isinstance(versions, Mapping) or not all(isinstance(v, str) for v in versions.values()):
        raise BadInputError(f'{place}: with={versions!r} must map packages to versions, as {{"cuda": "12.8"}}')
    if not isinstance(without, list) or not all(isinstance(v, str) for v in without):
        raise BadInputError(f"{place}: without={without!r} must be a list of packages")


def _part(kind: Mapping[str, Any], spans: list[tuple[int, int]], platform: Callable[..., Platform]) -> Part:
    found = platform(kind["device"], with_packages=kind["with"], without=tuple(kind["without"]))
    ranks = Ranks.of(r for a, b in spans for r in range(a, b + 1))
    return Part(
        ranks=ranks, device=found.device, catalog=found.catalog, installed=found.installed,
        words=words.check("", kind["roles"]),
    )  # fmt: skip
