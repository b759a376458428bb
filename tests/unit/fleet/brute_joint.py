"""Random questions for several kinds of ranks, and their answer by full enumeration: sets of tuples, no masks.

Judging one row is left to :class:`brute.Brute`, itself checked against the resolver; everything that joins kinds is
written here from the rules alone.
"""

from __future__ import annotations

import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "resolve"))

from brute import Brute
from generate import ALPHA, BETA, constraint, group, permissive, row

from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.domain import ANY, OneOf
from attn_core.resolve.joint import Member
from attn_core.spec import BackendSpec, Device, EngineOptions, ModelSpec
from attn_core.spec.fields import GRAPHS

POOR = Device(platform="alpha", arch="a0", isa=frozenset({"x"}))
PREFILL = frozenset({"prefill", "encode", "linear_prefill", "kv_write"})
DECODE = frozenset({"decode", "linear_decode", "kv_write"})


def question(seed: int) -> tuple[list[Member], ModelSpec, EngineOptions]:
    r = random.Random(seed)
    shapes = r.choice([["d"], ["d"], ["d", "d"], ["d", "encoder"], ["encoder"]])
    groups = {f"g{i}": group(r, s) for i, s in enumerate(shapes)}
    devices = r.choice([[ALPHA, BETA], [ALPHA, POOR], [ALPHA, BETA, POOR] if len(shapes) == 1 else [BETA, POOR]])
    sides: list[Any] = [None] * len(devices)
    if "d" in shapes and r.random() < 0.5:
        sides = [PREFILL, *[DECODE] * (len(devices) - 1)]
    members = []
    for i, (device, roles) in enumerate(zip(devices, sides)):
        catalog = Catalog({str(device): _declared(r, device, sorted({x for g in groups.values() for x in g.roles}))})
        installed = Installed(r.choice([{}, {"pkg": "1.5"}, {"pkg": "2.1", "gone": "1"}]))
        members.append(Member(where=f"rank {i}", device=device, catalog=catalog, installed=installed, roles=roles))
    pins: dict[str, Any] = {}
    for name, values in (
        ("page_size", [16, 64]), ("kv_cache_dtype", ["fp8_e4m3"]), ("kv_layout", ["HND"]), ("graph", ["none"]),
        ("world_size", [2]), ("uniform", ["groups", "all"]),
    ):  # fmt: skip
        if r.random() < 0.12:
            pins[name] = r.choice(values)
    return members, ModelSpec(groups=groups), EngineOptions(**pins)


def _declared(r: random.Random, device: Device, roles: list[str]) -> DeviceCatalog:
    plugins = [f"{device.platform}{i}" for i in range(2)]
    rows = [row(r, role, device, r.choice(plugins)) for role in roles for _ in range(r.choice([1, 2, 2]))]
    rows += [
        permissive(role, device, plugins[0], r.randrange(2))
        for role in roles
        if role != "kv_write" and r.random() < 0.45
    ]
    anything = {"dtype": ANY, "head_dim": ANY, "kv_cache_dtype": ANY, "kv_layout": OneOf("NHD", "HND"), "graph": ANY}
    if "kv_write" in roles:
        rows.append(
            BackendSpec(backend="copy", role="kv_write", platform=device.platform, tier=0, accepts=anything, plugin="p")
        )
    for name in ("unfused", *r.sample(["fused", "fused2"], r.randrange(3))):
        accepts = {"graph": ANY if name == "unfused" else r.choice([ANY, OneOf("full"), OneOf("none")])}
        tier = 0 if name == "unfused" else r.randrange(1, 4)
        rows.append(
            BackendSpec(backend=name, role="allreduce_fusion", platform=device.platform, tier=tier, accepts=accepts)
        )
    rules = tuple(constraint(r, i, r.choice(plugins)) for i in range(r.choice([0, 0, 1, 2])))
    return DeviceCatalog(tuple(rows), rules)


class JointBrute:
    """Every combination of every group on every kind, and every assignment."""

    def __init__(self, members: list[Member], model: ModelSpec, o: EngineOptions) -> None:
        self.members, self.o, self.model = members, o, model
        self.kinds = [Brute({"": m.device}, model, o, m.catalog, m.installed) for m in members]
        kv, pages = ({s[i] for k in self.kinds for s in k.shared} for i in (1, 2))
        for k in self.kinds:
            k.shared = list(product([o.graph] if o.graph else GRAPHS, kv, pages))
        self.sides = sorted({m.roles for m in members}, key=lambda x: sorted(x or ()))

    def roles(self, member: int, group: Any) -> tuple[str, ...]:
        asked = self.members[member].roles
        return tuple(r for r in group.roles if asked is None or r in asked)

    def layouts(self, group: Any) -> list[Any]:
        if not group.cached:
            return [None]
        if self.o.kv_layout:
            return [self.o.kv_layout]
        rows = [b for k in self.kinds for r in group.roles for b in k.rows(r)]
        named = [b.accepts["kv_layout"].values or () if "kv_layout" in b.accepts else ("NHD",) for b in rows]
        return sorted({v for values in named for v in values})

    def combos(self, member: int, name: str, group: Any) -> list[tuple[Any, Any, set[Any], dict[str, str]]]:
        """(key, names, {(shared, layout, width)}, backend by role) of one group on one kind."""
        kind, roles = self.kinds[member], self.roles(member, group)
        lists: dict[str, Any] = {}
        widths: set[int] = set()
        for role in roles:
            lists[role] = [(b, w, p) for b in kind.rows(role) for w, p in kind.variants(name, group, role, b, widths)]
            if role != "kv_write":
                widths |= {w for _, w, _ in lists[role]}
        out = []
        for combo in product(*lists.values()):
            numbers = {w for _, w, _ in combo if isinstance(w, int)}
            if len(numbers) > 1 or any(isinstance(w, frozenset) and not w & numbers for _, w, _ in combo):
                continue
            width = numbers.pop() if group.cached else None
            allowed = {
                (s, layout, width)
                for s in kind.shared
                for layout in self.layouts(group)
                if all(kind.admits(b, role, group, s, layout) for role, (b, _, _) in zip(roles, combo))
                and kind.rules(roles, combo, group, s, layout)
            }
            if allowed:
                names = tuple((b.backend, b.plugin, w if isinstance(w, int) else None) for b, w, _ in combo)
                by_role = {r: b.backend for r, (b, _, _) in zip(roles, combo) if r != "kv_write"}
                out.append((kind.key(roles, combo), names, allowed, by_role))
        return out

    def collective(self, member: int) -> list[tuple[Any, Any, set[Any], dict[str, str]]]:
        kind = self.kinds[member]
        out = []
        for b in kind.rows("allreduce_fusion"):
            allowed = {(s, None, None) for s in kind.shared if s[0] in b.accepts["graph"]}
            if allowed:
                out.append((kind.key(("allreduce_fusion",), ((b, 0, 0),)), (b.backend,), allowed, {}))
        return out

    def joined(self, found: list[tuple[int, list[Any]]], *, alike: bool) -> list[tuple[Any, Any, set[Any], Any]]:
        """One combination per kind that has the group: same cache dtype, page, layout, width; graph per side."""
        out = []
        for combo in product(*(c for _, c in found)):
            at = [self.sides.index(self.members[i].roles) for i, _ in found]
            if alike and any(a == b and x[1] != y[1] for a, x in zip(at, combo) for b, y in zip(at, combo)):
                continue
            allowed: set[Any] | None = None
            for side, c in zip(at, combo):
                mine = {
                    (graphs, kv, page, layout, width)
                    for (graph, kv, page), layout, width in c[2]
                    for graphs in product(*(GRAPHS if i != side else [graph] for i in range(len(self.sides))))
                }
                allowed = mine if allowed is None else allowed & mine
            if allowed:
                picks = {i: c for (i, _), c in zip(found, combo)}
                merged = self.kinds[0].total([c[0] for c in combo])
                out.append((merged, [c[1] for c in combo], {a[:3] for a in allowed}, picks, [c[0] for c in combo]))
        return out

    def uniform(self, picks: list[dict[int, Any]]) -> bool:
        if self.o.uniform == "none":
            return True
        for i in range(len(self.members)):
            mine = [p[i][3] for p in picks if i in p and p[i][3]]
            for role in {r for m in mine for r in m}:
                if len({m[role] for m in mine if role in m}) > 1:
                    return False
            if self.o.uniform == "all" and len({n for m in mine for n in m.values()}) > 1:
                return False
        return True

    def solve(self) -> tuple[Any, Any, set[Any]] | None:
        spaces = []
        for name, g in self.kinds[0].groups.items():
            found = [(i, self.combos(i, name, g)) for i in range(len(self.members)) if self.roles(i, g)]
            if found:
                spaces.append(self.joined(found, alike=False))
        spaces.append(self.joined([(i, self.collective(i)) for i in range(len(self.members))], alike=True))
        best = None
        for combo in product(*spaces):
            allowed = set.intersection(*(c[2] for c in combo))
            if allowed and self.uniform([c[3] for c in combo]):
                keys = [k for c in combo for k in c[4]]
                total = (*self.kinds[0].total(keys)[:5], [[k[5] for k in c[4]] for c in combo])
                if best is None or total < best[0]:
                    best = total, [c[1] for c in combo], allowed
        return best
