"""Decisions and refusals as text. Everything here is printed from data; nothing is decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from attn_core.spec import Tier

if TYPE_CHECKING:
    from attn_core.spec import Choice, Decision, Rejection

_MOST_LINES = 40


def explain(decision: Decision, *, verbose: bool = False) -> str:
    """What was chosen, why, what was refused and how the plugins fared.

    A backend with another row that serves is not listed as refused (``verbose`` does it): it is there. A better one
    that lost because it cannot be combined with the rest always is.
    """
    model = decision.model
    on = " + ".join(dict.fromkeys(_device(d) for d in decision.devices.values()))
    out = [f"{model.architecture or 'model'} on {on}   [{decision.digest}]"]
    out += [f"  note: {n}" for n in model.notes]
    for name, g in decision.groups.items():
        out.append(f"  group {name}: {_group(model.groups[name].to_json())}")
        for role, c in g.choices.items():
            others = decision.eligible.get(f"{name}.{role}", ())
            could = f"; also eligible: {_names(others)}" if others else ""
            out.append(f"    {role:<14} {_choice(c)}{could}")
        values = ", ".join(f"{k} {_number(v)}" for k, v in g.values.items())
        out.append(f"    {'values':<14} {values}")
        out += [f"    {'':<14}   {w}" for w in decision.because.get(f"{name}.head_dim", ())]
    for role, c in decision.roles.items():
        out.append(f"  {role}: {_choice(c)}")
    for name, value in decision.values.items():
        reasons = "; ".join(decision.because.get(name, ()))
        out.append(f"  {name}: {value}" + (f"  ({reasons})" if reasons else ""))
    served = {(c.backend, n, r) for n, g in decision.groups.items() for r, c in g.choices.items()}
    served |= {(c.backend, "", r) for r, c in decision.roles.items()}
    for place, names in decision.eligible.items():
        group, role = place.rsplit(".", 1)
        served |= {(b, group, role) for b in names}
    shown = (r for r in decision.rejections if verbose or r.code == "conflict" or _place(r) not in served)
    refused = grouped(shown, most=None if verbose else _MOST_LINES)
    if refused:
        out += ["  refused:", *(f"  {line}" for line in refused)]
    for p in decision.plugins:
        if verbose or p.status not in ("ok", "absent"):
            out.append(f"  plugin {p.name} {p.version}: {p.status}" + (f" ({p.error})" if p.error else ""))
    return "\n".join(out)


def _place(r: Rejection) -> tuple[str, str, str]:
    return (r.backend, r.group, r.role)


def grouped(rejections: Iterable[Rejection], most: int | None = _MOST_LINES) -> list[str]:
    """Reasons by backend: equal reasons of several roles and groups on one line, a hint once.

    Of a backend's several rows, those made for another kind of attention say nothing about this one and are left out.
    """
    by_backend: dict[tuple[str, str], dict[str, list[str]]] = {}
    hints: dict[tuple[str, str], list[str]] = {}
    for r in _relevant(rejections):
        key = (r.backend, r.plugin)
        by_backend.setdefault(key, {}).setdefault(r.text, []).append(f"{r.group} {r.role}".strip())
        if r.hint:
            hints.setdefault(key, []).append(r.hint)
    lines: list[str] = []
    for (backend, plugin), reasons in by_backend.items():
        lines.append(f"  {backend} ({plugin})" if plugin else f"  {backend}")
        lines += [f"    - {text} [{_where(where)}]" for text, where in reasons.items()]
        lines += [f"      try: {h}" for h in dict.fromkeys(hints.get((backend, plugin), ()))]
    if most is not None and len(lines) > most:
        left = len(lines) - most
        lines = [*lines[:most], f"  ... {left} more lines; see explain(verbose=True) or --json"]
    return lines


def _relevant(rejections: Iterable[Rejection]) -> Iterator[Rejection]:
    """Without the rows made for something else; only that reason where all of a backend's rows are."""
    places: dict[tuple[str, str, str, str], dict[int, list[Rejection]]] = {}
    for r in rejections:
        places.setdefault((r.backend, r.plugin, r.group, r.role), {}).setdefault(r.row, []).append(r)
    for rows in places.values():
        fitting = [reasons for reasons in rows.values() if not any(map(_for_something_else, reasons))]
        for reasons in fitting or [[r for r in reasons if _for_something_else(r)] for reasons in rows.values()]:
            yield from reasons


def _for_something_else(r: Rejection) -> bool:
    return r.field in ("kind", "attn_type") or (r.field == "sparse" and r.got == "none")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"


def _where(places: list[str]) -> str:
    places = list(dict.fromkeys(places))
    return ", ".join(places) if len(places) <= 4 else f"{', '.join(places[:3])} and {len(places) - 3} more"


def _device(device: object) -> str:
    name = getattr(device, "name", "")
    return f"{device} ({name})" if name else str(device)


def _choice(c: Choice) -> str:
    parts = [f"{c.backend} ({c.plugin}, {Tier(c.tier).name})"]
    if c.form:
        parts.append(c.form)
    if c.padded_from is not None:
        parts.append(f"padded {c.padded_from} -> {c.head_dim}")
    if c.bind is None:
        parts.append("run by the engine" if c.plugin == "core" else "declared only")
    parts += [f"{name} when {condition}" for name, condition in c.variants.items()]
    return ", ".join(parts)


_PLAIN = {None, False, "none", "mha", ()}


def _group(g: dict[str, object]) -> str:
    """The facts that matter, plain ones left out."""
    layers = g.get("layers")
    shape = f"{g['num_heads']}/{g.get('num_kv_heads', g.get('num_v_heads'))} heads x {g['head_dim']}"
    if g.get("v_head_dim") not in (None, g["head_dim"]):
        shape += f" (v {g['v_head_dim']})"
    parts = [str(g.get("attn_type", g["kind"])), shape, str(g["dtype"])]
    skip = {
        "num_heads",
        "num_kv_heads",
        "num_v_heads",
        "head_dim",
        "v_head_dim",
        "dtype",
        "layers",
        "linear",
        "attn_type",
    }
    for name, value in g.items():
        if name in skip or (not isinstance(value, list) and value in _PLAIN):
            continue
        shown = "yes" if isinstance(value, list) else _number(value)
        parts.append(name if value is True else f"{name} {shown}")
    if isinstance(layers, list) and layers:
        parts.append(f"{len(layers)} layers")
    return ", ".join(parts)


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
