"""Step 1: judge every backend on its own, and collect every reason against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attn_core.catalog import Installed
from attn_core.domain import ANY, Domain, OneOf
from attn_core.spec import BackendSpec, Choice, Device, EngineOptions, Rejection
from attn_core.spec.decision import RejectionCode
from attn_core.spec.fields import FIELDS, RELEVANT, SHARED
from attn_core.spec.model import Group

_UNKNOWN_PASSES = frozenset(n for n, f in FIELDS.items() if f.unknown_passes)
_FEATURES = {
    n: frozenset(f.default.values or ())
    for n, f in FIELDS.items()
    if f.is_feature and f.scope != "claim" and f.default is not None
}
"""Feature -> the plain values a backend that says nothing accepts."""
_FEATURES_OF = {role: tuple((n, p) for n, p in _FEATURES.items() if n in names) for role, names in RELEVANT.items()}
_SETTLED = frozenset(n for n, f in FIELDS.items() if f.settled)
_CLAIM = frozenset(n for n, f in FIELDS.items() if f.scope == "claim")
_ALWAYS_INT = frozenset(
    {"head_dim", "v_head_dim", "num_heads", "num_kv_heads", "group_size", "tensor_parallel", "world_size"}
)
_WIDTHS = ("head_dim", "v_head_dim", "head_dims")


class Row:
    """A BackendSpec prepared for judging: only the checks that can fail, in plain containers. Made once per catalog."""

    __slots__ = (
        "checks",
        "choice",
        "index",
        "layouts",
        "memo",
        "needs",
        "number",
        "required",
        "settled",
        "shaped",
        "spec",
        "stated",
    )

    def __init__(self, spec: BackendSpec, index: int, number: int) -> None:
        self.spec = spec
        self.number = number
        """Place among the backend's rows for its role."""
        self.index = index
        """Place in the catalog's content order: the last tie-break."""
        self.stated = frozenset(spec.accepts)
        self.needs = spec.needs
        self.shaped = bool(spec.pads) or spec.role == "kv_write"
        """Whether kernel widths must be searched for, rather than being the model's."""
        self.required = tuple((r, r.name) for r in spec.requires if not isinstance(r, str))
        padded = set(_WIDTHS) if "head_dim" in spec.pads or spec.role == "kv_write" else set()
        padded |= {"num_heads", "group_size"} if "num_heads" in spec.pads else set()
        judged = RELEVANT[spec.role] - _SETTLED - _CLAIM - padded
        self.checks = tuple((n, _fast(n, d)) for n, d in spec.accepts.items() if n in judged and not d.is_any)
        self.settled = tuple(
            (n, d)
            for n in (*SHARED, "kv_layout", "mla_query")
            if n in RELEVANT[spec.role] and not (n == "mla_query" and spec.form != "absorbed")
            if (d := spec.accepts.get(n, FIELDS[n].default)) is not None and not d.is_any
        )
        """Domains on the values the resolver settles, defaults included."""
        self.layouts = tuple(v for n, d in self.settled if n == "kv_layout" for v in d.values or ())
        """Cache layouts this row names."""
        self.memo: tuple[Any, ...] = (None, None, None, None, 0)
        """The last mask computed for this row, and what it was computed for."""
        self.choice: tuple[Any, Choice | None] = (None, None)
        """The last Choice made of this row, and what it was made for."""


def _fast(name: str, d: Domain) -> Domain | frozenset[Any] | range:
    """The same set in a container that answers faster. Fields are typed and declarations validated, so ``True`` never
    meets ``1``; a range is used only for facts that are always integers (it would search for None one by one)."""
    if d.values is not None:
        return frozenset(d.values)
    if d.step is not None and not d.excluded and name in _ALWAYS_INT:
        least = d.step if d.min is None else d.min
        return range(-(-least // d.step) * d.step, (1 << 62) if d.max is None else d.max + 1, d.step)
    return d


class Raw(NamedTuple):
    """A reason not yet put into words; most are never read."""

    code: RejectionCode
    row: Row
    group: str
    field: str
    got: Any
    allowed: Any
    hint: str = ""

    def rejection(self) -> Rejection:
        allowed, spec = self.allowed, self.row.spec
        if isinstance(allowed, Domain):
            allowed = allowed.values if allowed.values is not None else str(allowed)
        return Rejection(
            code=self.code, backend=spec.backend, role=spec.role, group=self.group, field=self.field,
            got=self.got, allowed=allowed, plugin=spec.plugin, hint=self.hint, row=self.row.number,
        )  # fmt: skip


class Rejections(Sequence[Rejection]):
    """Rejections worked out on first reading: a decision that nobody explains pays nothing for them."""

    def __init__(self, reasons: Callable[[], Iterable[Rejection]]) -> None:
        self._reasons: Callable[[], Iterable[Rejection]] | None = reasons
        self._made: tuple[Rejection, ...] = ()

    def _all(self) -> tuple[Rejection, ...]:
        if self._reasons is not None:
            self._made = tuple(sorted(self._reasons(), key=_order))
            self._reasons = None
        return self._made

    def __getitem__(self, i: Any) -> Any:
        return self._all()[i]

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return self._all() == tuple(other) if isinstance(other, Sequence) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[type, tuple[tuple[Rejection, ...]]]:
        return (tuple, (self._all(),))


def _order(r: Rejection) -> tuple[str, ...]:
    return (r.group, r.role, r.backend, r.plugin, f"{r.row:04}", r.code, r.field, repr(r.got), repr(r.allowed))


class Candidate(NamedTuple):
    """A live row in one kernel width: what the combiner works with."""

    row: Row
    tier: int
    rank: int
    padded: int
    """Columns of zeros per token that padding adds to q."""
    widths: tuple[int | None, ...]
    """Kernel head_dims this candidate can run at (writers take any)."""
    num_heads: int | None
    native_width: int | None = None
    """The model's width, where the row runs it padded."""

    @property
    def spec(self) -> BackendSpec:
        return self.row.spec


class Facts:
    """What one group on one device is judged on, engine and device included: made once, shared by its roles."""

    def __init__(self, group: Group, device: Device, options: EngineOptions) -> None:
        self.group = group
        self.common = {
            **options.facts(),
            "device.arch": device.arch,
            "device.total_memory": device.total_memory,
            "device.shared_memory_per_block": device.shared_memory_per_block,
        }
        self._of: dict[str | None, dict[str, Any]] = {}

    def of(self, form: str | None) -> dict[str, Any]:
        """The facts as a kernel of this form sees them."""
        found = self._of.get(form)
        if found is None:
            found = self._of[form] = {**self.common, **self.group.facts(form)}
        return found


class Judge:
    """Judges rows of one role on one device for one group."""

    def __init__(
        self,
        name: str,
        facts: Facts,
        role: str,
        device: Device,
        options: EngineOptions,
        installed: Installed,
        written_for: Mapping[str, Mapping[str, str]],
        widths: tuple[int, ...] = (),
    ) -> None:
        self.name, self.facts, self.group, self.role, self.device = name, facts, facts.group, role, device
        self.widths = widths
        """``kv_write`` only: the kernel widths that the group's attention roles may settle on."""
        self.installed, self.written_for = installed, written_for
        self.deny = frozenset(options.deny)
        self.pinned = options.pinned_backend(name, role)
        self.pins = {n: v for n in (*SHARED, "kv_layout") if (v := getattr(options, n)) is not None}
        self._demands: dict[str | None, tuple[str, ...]] = {}

    def demands(self, form: str | None) -> tuple[str, ...]:
        """Features a row must claim: those whose value here is not the plain one."""
        found = self._demands.get(form)
        if found is None:
            facts = self.facts.of(form)
            asked = (n for n, plain in _FEATURES_OF[self.role] if n in facts and facts[n] not in plain)
            found = self._demands[form] = tuple(asked)
        return found

    def candidates(self, rows: Iterable[Row], rejected: list[tuple[Judge, Row]]) -> list[Candidate]:
        """The rows that survive, in every kernel width they could run at; the others are put on ``rejected``."""
        out: list[Candidate] = []
        for row in rows:
            spec = row.spec
            facts, demands = self.facts.of(spec.form), self.demands(spec.form)
            if next(self._reasons(row, facts, demands), None) is not None:
                rejected.append((self, row))
            elif row.shaped:
                out += self._shapes(row, facts)
            else:
                out.append(Candidate(row, spec.tier, spec.rank, 0, (facts.get("head_dim"),), facts.get("num_heads")))
        return out

    def reasons(self, row: Row) -> Iterator[Raw]:
        """Every reason against a row."""
        return self._reasons(row, self.facts.of(row.spec.form), self.demands(row.spec.form))

    def _reasons(self, row: Row, facts: dict[str, Any], demands: tuple[str, ...]) -> Iterator[Raw]:
        """One by one, so that judging stops at the first and explaining goes on to the last."""
        spec = row.spec
        for name in demands:
            if name not in row.stated:
                yield self._raw("feature", row, name, facts[name], FIELDS[name].default)
        if not row.needs <= self.device.isa:
            yield self._raw("isa", row, "isa", self.device.arch, tuple(sorted(row.needs - self.device.isa)))
        if self.deny and spec.backend in self.deny:
            yield self._raw("denied", row, "backend", spec.backend, None)
        if self.pinned is not None and spec.backend != self.pinned:
            yield self._raw("pin", row, "backend", self.pinned, OneOf(spec.backend))
        for name, allowed in row.checks:
            if name not in facts:
                continue
            value = facts[name]
            if value not in allowed and not (value is None and name in _UNKNOWN_PASSES):
                plain = _FEATURES.get(name)
                code: RejectionCode = "value" if plain is None or value in plain else "feature"
                yield self._raw(code, row, name, value, spec.accepts[name])
        if row.shaped and not self._shapes(row, facts):
            yield self._unreachable(row, facts)
        if self.pins:
            yield from self._pin_reasons(row)
        for requirement, package in row.required:
            found = self.installed.version(requirement, self.written_for.get(spec.plugin, {}))
            hint = requirement.install or f"install {requirement.spec}"
            if found is None:
                wrong = self.installed.objection(requirement)
                yield self._raw("package", row, package, requirement.spec, None, f"{wrong}; {hint}" if wrong else hint)
            elif found and not requirement.admits(found):
                yield self._raw("version", row, package, found, requirement.range, hint)
        if why := self.installed.unusable.get(spec.bind or ""):
            yield self._raw("package", row, "kernel", why, None)

    def _pin_reasons(self, row: Row) -> Iterator[Raw]:
        for name, value in self.pins.items():
            if name in RELEVANT[self.role] and (self.group.cached or name == "graph"):
                allowed = row.spec.accepts.get(name, FIELDS[name].default)
                if allowed is not None and not admits(name, value, allowed, self.group.dtype):
                    yield self._raw("pin", row, name, value, allowed)

    def _shapes(self, row: Row, facts: dict[str, Any]) -> list[Candidate]:
        """Kernel widths and head counts a padding row (or a writer) can reach, narrowest first."""
        spec, accepts = row.spec, row.spec.accepts
        d, dv, heads = facts["head_dim"], facts["v_head_dim"], facts.get("num_heads")
        pads, kernel_heads = "head_dim" in spec.pads and self.group.kind == "mha", heads
        if "num_heads" in spec.pads and heads is not None:
            kv, ratio, counts = facts["num_kv_heads"], accepts.get("group_size", ANY), accepts.get("num_heads", ANY)
            fits = [h for h in _at_least(heads, [counts]) if h in counts and h % kv == 0 and h // kv in ratio]
            if not fits:
                return []
            kernel_heads = fits[0]
        pool = [accepts[n] for n in ("head_dim", "head_dims") if n in accepts]
        widths = [
            w
            for w in (self.widths or [d] if self.role == "kv_write" else _at_least(d, pool) if pads else [d])
            if w in accepts.get("head_dim", ANY)
            and (wv := w if dv == d else dv) in accepts.get("v_head_dim", ANY)
            and (w, wv) in accepts.get("head_dims", ANY)
        ]
        if self.role == "kv_write":
            return [Candidate(row, spec.tier, spec.rank, 0, tuple(widths), None)] if widths else []
        zeros = [(kernel_heads or 1) * w - (heads or 1) * d for w in widths]
        return [Candidate(row, spec.tier, spec.rank, z, (w,), kernel_heads, d) for w, z in zip(widths, zeros)]

    def _unreachable(self, row: Row, facts: dict[str, Any]) -> Raw:
        """The first shape field that no padding brings into the row's domain."""
        accepts = row.spec.accepts
        names = ("num_heads",) if "num_heads" in row.spec.pads else ()
        for name in (*names, *_WIDTHS):
            if name in accepts and facts[name] not in accepts[name]:
                return self._raw("value", row, name, facts[name], accepts[name])
        return self._raw("value", row, "head_dims", facts["head_dims"], accepts.get("head_dims", ANY))

    def _raw(self, code: RejectionCode, row: Row, field: str, got: Any, allowed: Any, hint: str = "") -> Raw:
        return Raw(code, row, self.name, field, got, allowed, hint)


def admits(name: str, value: Any, allowed: Domain, own: str | None) -> bool:
    """Whether a settled value lies in a domain; ``auto`` in a cache dtype stands for the group's ``own`` dtype."""
    if name == "kv_cache_dtype" and value in (own, "auto"):
        return own in allowed or "auto" in allowed
    return value in allowed


def _at_least(size: int, domains: Iterable[Domain]) -> list[int]:
    """Sizes from ``size`` up that padding may reach: itself, every listed one, and the next multiple of a step."""
    sizes: set[Any] = {size}
    for d in domains:
        sizes |= {v[0] if isinstance(v, tuple) else v for v in d.values or ()}
        if d.step:
            sizes |= {-(-size // d.step) * d.step, d.min or d.step}
    return sorted(w for w in sizes if w >= size)
