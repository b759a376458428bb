"""A resolver by full enumeration, written from the rules and sharing no code with the real one but the vocabulary.

It lists every combination of rows and kernel widths of every group, every assignment of every value, keeps what all
rules allow, and takes the smallest key. Slow on purpose; sets of tuples instead of masks.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from attn_core.catalog import Catalog, Installed
from attn_core.domain import ANY, Domain
from attn_core.spec import FIELDS, BackendSpec, Device, EngineOptions, ModelSpec
from attn_core.spec.check import KV_CACHE_DTYPES
from attn_core.spec.fields import GRAPHS, PAGE_SIZES, RELEVANT

ACCOMPANYING = ("kv_write", "allreduce_fusion")


def default(field: str) -> Domain:
    d = FIELDS[field].default
    return ANY if d is None else d


def in_kv(value: str, d: Domain, own: str) -> bool:
    return value in d or (value in (own, "auto") and (own in d or "auto" in d))


class Brute:
    def __init__(self, devices: dict[str, Device], model: ModelSpec, o: EngineOptions, cat: Catalog, inst: Installed):
        self.devices, self.o, self.cat, self.inst = devices, o, cat, inst
        self.groups = {n: g.sharded(o.tensor_parallel) for n, g in model.groups.items()}
        self.dtypes = [g.dtype for g in self.groups.values() if g.cached]
        rows = [b for d in cat.devices.values() for b in d.backends]
        sides = [b.accepts for b in rows] + [
            s for d in cat.devices.values() for c in d.constraints for s in (c.when, c.then)
        ]
        pages = set(PAGE_SIZES) | {
            v for s in sides if "page_size" in s for v in s["page_size"].named if isinstance(v, int) and v > 0
        }
        own = [self.dtypes[0]] if len(set(self.dtypes)) == 1 else ["auto", *self.dtypes]
        named = {v for s in sides if "kv_cache_dtype" in s for v in s["kv_cache_dtype"].named}
        kv = own + [d for d in KV_CACHE_DTYPES if d in named and d != "auto" and d not in own]
        cached = bool(self.dtypes)
        self.shared = list(
            product(
                [o.graph] if o.graph else GRAPHS,
                ([o.kv_cache_dtype] if o.kv_cache_dtype else dict.fromkeys(kv)) if cached else [None],
                ([o.page_size] if o.page_size else sorted(pages)) if cached else [None],
            )
        )

    def device(self, role: str) -> Device:
        return self.devices.get(role, self.devices.get("")) or self.devices["decode"]

    def rows(self, role: str) -> list[BackendSpec]:
        return [b for b in self.cat.devices[str(self.device(role))].backends if b.role == role]

    def facts(self, group: Any, role: str, form: str | None) -> dict[str, Any]:
        d = self.device(role)
        device = {"arch": d.arch, "total_memory": d.total_memory, "shared_memory_per_block": d.shared_memory_per_block}
        every = {**self.o.facts(), **group.facts(form), **{f"device.{k}": v for k, v in device.items()}}
        return {k: v for k, v in every.items() if k in RELEVANT[role]}

    def variants(self, name: str, group: Any, role: str, b: BackendSpec, widths: set[int]) -> list[tuple[Any, int]]:
        """(kernel width or set of widths, padded columns) a row can run at; empty when some rule refuses it."""
        f = self.facts(group, role, b.form)
        pin = self.o.pinned_backend(name, role)
        if b.backend in self.o.deny or (pin is not None and b.backend != pin):
            return []
        if not self.present(b, role):
            return []
        writer = role == "kv_write"
        open_widths = writer or "head_dim" in b.pads
        skip = {"head_dim", "v_head_dim", "head_dims"} if open_widths else set()
        for field, spec in FIELDS.items():
            if field not in f or field in skip or spec.settled or spec.scope == "claim":
                continue
            d = b.accepts.get(field, default(field))
            if f[field] not in d and not (f[field] is None and spec.unknown_passes):
                return []
        own, dv = f.get("head_dim"), f.get("v_head_dim")
        if not open_widths:
            return [(own, 0)]
        if writer:
            pool = widths or {own}
        else:
            pool = {own} | set(range(own, 1025))
        ok = []
        for w in sorted(pool):
            wv = w if own == dv else dv
            if (
                w in b.accepts.get("head_dim", ANY)
                and wv in b.accepts.get("v_head_dim", ANY)
                and (w, wv) in b.accepts.get("head_dims", ANY)
            ):
                ok.append(w)
        if writer:
            return [(frozenset(ok), 0)] if ok else []
        d = b.accepts.get("head_dim", ANY)
        if d.values is None:  # a step: native, the least and the next multiple are what padding may reach
            reach = {own, d.min or d.step or own, -(-own // d.step) * d.step if d.step else own}
            ok = [w for w in ok if w in reach]
        heads = f.get("num_heads") or 1
        return [(w, heads * w - heads * own) for w in ok]

    def present(self, b: BackendSpec, role: str) -> bool:
        """Whether the device has the instructions and the machine the packages."""
        versions = [(r, self.inst.versions.get(r.name)) for r in b.requires]
        return b.needs <= self.device(role).isa and all(v is not None and r.admits(v) for r, v in versions)

    def group_solutions(self, name: str, group: Any) -> list[tuple[Any, Any, set[Any]]]:
        """(key, row names, allowed shared assignments) of every feasible combination of one group."""
        roles = group.roles
        lists: dict[str, list[tuple[BackendSpec, Any, int]]] = {}
        widths: set[int] = set()
        for role in roles:
            lists[role] = [(b, w, p) for b in self.rows(role) for w, p in self.variants(name, group, role, b, widths)]
            if role not in ACCOMPANYING:
                widths |= {w for _, w, _ in lists[role] if isinstance(w, int)}
        layouts = {
            v
            for rows in lists.values()
            for b, _, _ in rows
            for v in (b.accepts.get("kv_layout", default("kv_layout")).values or ())
        } or {"NHD"}
        if not group.cached:
            local = [(None,)]
        else:
            local = [(x,) for x in ([self.o.kv_layout] if self.o.kv_layout else sorted(layouts))]
        out = []
        for combo in product(*lists.values()):
            numbers = {w for _, w, _ in combo if isinstance(w, int)}
            sets = [w for _, w, _ in combo if isinstance(w, frozenset)]
            if group.kind == "mha" and (len(numbers) > 1 or any(not (s & numbers) for s in sets)):
                continue
            allowed = {
                s
                for s in self.shared
                for (layout,) in local
                if all(self.admits(b, role, group, s, layout) for role, (b, _, _) in zip(roles, combo))
                and self.rules(roles, combo, group, s, layout)
            }
            if allowed:
                out.append((self.key(roles, combo), tuple((b.backend, b.plugin, w) for b, w, _ in combo), allowed))
        return out

    def admits(self, b: BackendSpec, role: str, group: Any, s: tuple[Any, ...], layout: Any) -> bool:
        values = dict(zip(("graph", "kv_cache_dtype", "page_size"), s)) | {"kv_layout": layout}
        for field, v in values.items():
            if v is None or field not in RELEVANT[role]:
                continue
            d = b.accepts.get(field, default(field))
            if not (in_kv(v, d, getattr(group, "dtype", "")) if field == "kv_cache_dtype" else v in d):
                return False
        return True

    def rules(self, roles: Any, combo: Any, group: Any, s: tuple[Any, ...], layout: Any) -> bool:
        values = dict(zip(("graph", "kv_cache_dtype", "page_size"), s)) | {"kv_layout": layout}
        for device in {str(self.device(r)) for r in roles}:
            here = {r: b for r, (b, _, _) in zip(roles, combo) if str(self.device(r)) == device}
            dev = next(self.device(r) for r in here)
            for c in self.cat.devices[device].constraints:
                if not any(b.plugin == c.plugin for b in here.values()):
                    continue
                facts = {**self.o.facts(), **group.facts(), "device.arch": dev.arch}
                verdicts = []
                applicable = True
                for side in (c.when, c.then):
                    holds = True
                    for field, d in side.items():
                        if field in RELEVANT:
                            if field not in roles:
                                applicable = False
                                break
                            holds &= dict(zip(roles, combo))[field][0].backend in d
                        elif FIELDS[field].settled:
                            v = values.get(field)
                            if v is None:
                                applicable = False
                                break
                            holds &= in_kv(v, d, group.dtype) if field == "kv_cache_dtype" else v in d
                        elif field not in facts or (facts[field] is None and FIELDS[field].unknown_passes):
                            applicable = False
                            break
                        else:
                            holds &= facts[field] in d
                    verdicts.append(holds)
                if applicable and verdicts[0] and not verdicts[1]:
                    return False
        return True

    @staticmethod
    def key(roles: Any, combo: Any) -> Any:
        required = sorted(int(b.tier) for r, (b, _, _) in zip(roles, combo) if r not in ACCOMPANYING)
        extra = sorted(int(b.tier) for r, (b, _, _) in zip(roles, combo) if r in ACCOMPANYING)
        names = {b.backend for r, (b, _, _) in zip(roles, combo) if r in ("prefill", "decode")}
        tail = tuple((b.backend, b.content, w if isinstance(w, int) else 0) for b, w, _ in combo)
        return (
            required,
            extra,
            sum(b.rank for b, _, _ in combo),
            sum(p for _, _, p in combo),
            int(len(names) > 1),
            tail,
        )

    @staticmethod
    def total(keys: list[Any]) -> Any:
        return (
            [-t for t in sorted(t for k in keys for t in k[0])],
            [-t for t in sorted(t for k in keys for t in k[1])],
            sum(k[2] for k in keys),
            sum(k[3] for k in keys),
            sum(k[4] for k in keys),
            tuple(k[5] for k in keys),
        )

    def solve(self) -> tuple[Any, list[Any], set[Any]] | None:
        spaces = [self.group_solutions(n, g) for n, g in self.groups.items()]
        extra = list(self.rows("allreduce_fusion"))
        first = next(iter(self.groups.values()))
        alone = []
        for b in extra:
            f = self.facts(first, "allreduce_fusion", None)
            bad = [
                x for x in f if f[x] not in b.accepts.get(x, default(x)) and not FIELDS[x].settled and f[x] is not None
            ]
            if bad or not self.present(b, "allreduce_fusion") or b.backend in self.o.deny:
                continue
            allowed = {s for s in self.shared if s[0] in b.accepts.get("graph", default("graph"))}
            if allowed:
                alone.append((self.key(("allreduce_fusion",), ((b, 0, 0),)), (b.backend,), allowed))
        if extra:
            spaces.append(alone)
        best = None
        for combo in product(*spaces):
            allowed = set.intersection(*(c[2] for c in combo))
            if allowed:
                total = self.total([c[0] for c in combo])
                if best is None or total < best[0]:
                    best = total, [c[1] for c in combo], allowed
        return best
