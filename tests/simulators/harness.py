"""Runs adapters through the resolver and the runtime on CPU tensors, and judges them by the float64 reference.

``bound(rows, case)`` resolves one small model among the given rows, binds it as an engine would, and ``check`` runs a
step of it. Nothing here is mocked but the vendor's package (see ``standin``), so a case that the rows do not claim is
refused, padding and out= are the core's, and the cache is written by the core's writer.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_core import Batch, ModelSpec
from attn_core.backends import builtin
from attn_core.catalog import Catalog, DeviceCatalog, Installed
from attn_core.domain import OneOf
from attn_core.errors import AttnCoreError
from attn_core.resolve import resolve
from attn_core.runtime import BoundGroup, KVCache
from attn_core.runtime.backend import bind_decision
from attn_core.spec import AttentionSpec, BackendSpec, Constraint, Device, EngineOptions
from attn_core.testing import reference
from attn_core.testing.compare import differences
from numerics.kernel_cases import (
    DTYPES,
    MIXED,
    Lengths,
    Step,
    cross_step,
    encode_step,
    fill,
    gapped,
    random,
    slots,
    step,
    table,
)
from simulators.contract import Misuse, Refused
from simulators.standin import StandIn, installed

DECODE = Lengths((1, 1, 1, 1), (9, 1, 37, 150))
PREFILL = Lengths((5, 7, 4, 70), (30, 7, 41, 70))
VERIFY = Lengths((3, 3, 3), (9, 3, 140))
RAGGED = Lengths((5, 1, 17, 80), (5, 1, 17, 80))
"""For encoders: keys are the queries."""
CROSS = Lengths((1, 1, 6, 3), (9, 130, 4, 20))
MANY = {"decode": DECODE, "prefill": PREFILL, "mixed": MIXED}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step of one small model. ``spec``: fields of the AttentionSpec over :data:`MHA`, with kind mla over
    :data:`MLA`. ``options``: of EngineOptions; LSE is asked for unless ``lse=False``."""

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: Lengths = MIXED
    batch: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the Batch: ``decode_width``, ``tree_mask``, ..."""
    bounds: Sequence[int] | None = None
    """What the host believes the kv lengths to be at most."""
    scales: tuple[Any, Any] = (1.0, 1.0)
    lse: bool = True
    q_dtype: torch.dtype | None = None
    """What the kernel rounds q to before it multiplies (8-bit caches); the reference then gets the same q."""
    ulps: float = 2.0
    mla_query: str | None = None
    """Pins what no option pins: q ``packed`` or ``split``."""
    plain: Callable[[KVCache], KVCache] = lambda cache: cache
    """A cache of a private layout as one that the reference reads."""

    @property
    def model(self) -> AttentionSpec:
        return AttentionSpec(**{**(MLA if self.spec.get("kind") == "mla" else MHA), **self.spec})


MHA: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 64, "dtype": "bfloat16"}
"""Heads that are no power of two and unequal; a case overrides what its kernel cannot do."""
MLA: dict[str, Any] = {
    "kind": "mla", "num_heads": 4, "head_dim": 192, "nope_dim": 128, "rope_dim": 64, "v_head_dim": 128,
    "latent_dim": 512, "dtype": "bfloat16",
}  # fmt: skip
"""DeepSeek's widths."""


def rows_of(
    plugin: str, device: Device, backend: str, **attributes: Any
) -> tuple[tuple[BackendSpec, ...], tuple[Constraint, ...], Device]:
    """A plugin's rows of one backend on a device, with its rules: what ``bound`` and ``check`` take.

    ``attributes``: of the rows, e.g. ``form="absorbed"``; rows of other roles than attention always stay.
    """
    module = importlib.import_module(f"attn_plugin_{plugin}")
    rows = [r for r in module.attn_backends(device=device) if r.backend == backend]
    rows = [r for r in rows if all(getattr(r, k) == v for k, v in attributes.items())]
    if not rows:
        raise ValueError(f"{plugin} has no rows of {backend} on {device.arch} with {attributes}")
    rules = getattr(module, "attn_constraints", lambda device: ())(device=device)
    return tuple(replace(r, plugin=plugin) for r in rows), tuple(replace(c, plugin=plugin) for c in rules), device


Rows = tuple[tuple[BackendSpec, ...], tuple[Constraint, ...], Device]


def device(plugin: str, arch: str) -> Device:
    """A known device of a plugin's platforms."""
    module = importlib.import_module(f"attn_plugin_{plugin}")
    return {d.arch: d for p in module.attn_platforms() for d in p.known}[arch]


def bound(rows: Rows, case: Case, torch_device: str = "cpu") -> BoundGroup:
    """Resolve ``case`` among ``rows`` (and core's writers) and bind. Raises NoBackendError where not claimed."""
    mine, rules, dev = rows
    if case.mla_query is not None:
        narrow = OneOf(case.mla_query)
        mine = tuple(replace(r, accepts={**r.accepts, "mla_query": narrow}) if r.form else r for r in mine)
    core = tuple(replace(r, plugin="core") for r in builtin.backends(dev))
    catalog = Catalog({str(dev): DeviceCatalog((*mine, *core), rules)})
    known = Installed(versions={"torch": torch.__version__, **dev.versions}, assume=True)
    options = EngineOptions(**{"lse": case.lse, **case.options})
    decision = resolve(dev, ModelSpec.of(case.model), options, catalog, known)
    (group,) = bind_decision(decision, torch_device).groups.values()
    return group


def make_step(group: BoundGroup, case: Case, seed: int = 0) -> Step:
    """A step with random inputs: everything an engine would hold. Sinks are numbers of the model's dtype."""
    if group.spec.attn_type == "encoder_only":
        made = encode_step(group, case.lengths, seed=seed)
    elif group.spec.attn_type == "cross":
        made = cross_step(group, case.lengths, seed=seed)
    else:
        made = step(group, case.lengths, seed=seed, scales=case.scales, bounds=case.bounds, **case.batch)
    if "sinks" in made.extra:
        made.extra["sinks"] = made.extra["sinks"].to(DTYPES[group.spec.dtype]).float()
    return made


def wrong(made: Step, case: Case) -> list[str]:
    """What is wrong with the step's result; empty when nothing is.

    Run as planned, into an ``out=`` with gaps without LSE, and into one without gaps, in a plan that served a step of
    other lengths and pages before.
    """
    want, want_lse = _wanted(made, case)
    group = made.group
    before = make_step(
        group, replace(case, lengths=_longer(case), bounds=case.bounds and [n + 3 for n in case.bounds]), 1
    )
    refilled = replace(made, plan=group.plan(made.batch, out=before.plan))
    out = torch.full(tuple(want.shape), float("nan"), dtype=group.bindings[_any_role(group)].dtype)
    runs = ((made, {}, case.lse), (made, {"out": gapped(out)}, False), (refilled, {"out": out}, case.lse))
    found = []
    for step_of_two, given, asked in runs:
        got = step_of_two.run(return_lse=asked, **given)
        if isinstance(got, Tensor) is asked:
            return [*found, f"return_lse={asked} gave {type(got).__name__}"]
        o, lse = got if asked else (got, None)
        if given and o is not given["out"]:
            found.append("out= was not returned")
        found += differences(o, want, o.dtype, lse=lse, want_lse=want_lse if asked else None, ulps=case.ulps)
    return found


def _longer(case: Case) -> Lengths:
    """Other lengths of a step of the same kind."""
    query, kv = case.lengths.query, [n + 3 for n in case.lengths.kv]
    return Lengths(kv, kv) if case.spec.get("attn_type") == "encoder_only" else Lengths(query, kv)


def _any_role(group: BoundGroup) -> str:
    return next(r for r in ("decode", "encode", "prefill") if r in group.bindings)


def _wanted(made: Step, case: Case) -> tuple[Tensor, Tensor]:
    """The reference's answer, on the cache as it is after the new keys were written."""
    if made.k is not None and made.cache is not None:
        made.group.write_kv(made.k, made.v, made.cache, made.plan)
    cache = None if made.cache is None else case.plain(made.cache)
    rounded = replace(made, q=_rounded(made.q, case.q_dtype), cache=cache)
    return rounded.want()


def _rounded(q: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return q
    return tuple(_rounded(x, dtype) for x in q) if isinstance(q, tuple) else q.to(dtype).to(q.dtype)


def check(rows: Rows, case: Case, *stand_ins: StandIn, seed: int = 0) -> BoundGroup:
    """Bind with the stand-ins in place, run, compare; returns the group for further tests."""
    with installed(*stand_ins):
        group = bound(rows, case)
    found = wrong(make_step(group, case, seed), case)
    assert not found, f"{case.name}: {found}"
    return group


# Materialised MLA -----------------------------------------------------------------------------------------------------


def wrong_materialised(
    group: BoundGroup, lengths: Lengths, *, lse: bool = True, chunk_tokens: int | None = None
) -> list[str]:
    """Prefill rows with and without cached context, over keys expanded by random weights; what is wrong with it."""
    s, g = group.spec, torch.Generator().manual_seed(0)
    page = group.page_size or 1
    block_table, pages = table(lengths.kv, page, g)
    cache = group.new_kv_cache(pages)
    fill(cache, g)
    batch = Batch(
        list(lengths.query), list(lengths.kv), block_table=block_table,
        slot_mapping=slots(block_table, lengths.query, lengths.kv, page),
    )  # fmt: skip
    dtype, latent_dim, tokens = DTYPES[s.dtype], s.latent_dim or 0, sum(lengths.query)
    latent, rope = (random(g, dtype, tokens, w) for w in (latent_dim, s.rope_dim or 0))
    w_k, w_v = (
        torch.randn(latent_dim, s.num_heads, w, generator=g) * latent_dim**-0.5 for w in (s.nope_dim or 0, s.v_head_dim)
    )

    def expand(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (torch.einsum("tl,lhn->thn", latent.float(), w) for w in (w_k, w_v))
        return torch.cat([k, rope.float()[:, None].expand(-1, s.num_heads, -1)], -1).to(dtype), v.to(dtype)

    q = random(g, dtype, tokens, s.num_heads, s.head_dim)
    plan = group.plan(batch)
    group.write_kv(latent, rope, cache, plan)
    new = expand(latent, rope)
    got = group.prefill_with_context(q, *new, cache, plan, expand, chunk_tokens=chunk_tokens, return_lse=lse)
    outputs, sums, token = [], [], 0
    for i, (n, m) in enumerate(zip(lengths.query, lengths.kv)):
        row, _ = reference.stored_keys(s, cache, block_table[i], m - n)
        k, v = expand(*row[:, 0].to(dtype).split([latent_dim, s.rope_dim or 0], -1))
        k, v = (torch.cat([a, b[token : token + n]]) for a, b in zip((k, v), new))
        o, sums_of = reference.attend(
            q[token : token + n], k, v, reference.visible(n, m), scale=group.scale, softcap=s.logit_softcap
        )
        outputs.append(o)
        sums.append(sums_of)
        token += n
    o, given = got if lse else (got, None)
    return differences(o, torch.cat(outputs), dtype, lse=given, want_lse=torch.cat(sums) if lse else None, ulps=3.0)


# Mutations ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A small wrong in an adapter's source: ``old`` becomes ``new`` wherever it stands."""

    what: str
    module: str
    old: str
    new: str
    count: int = 1
    """How often ``old`` must stand there; otherwise the mutation no longer says what it did."""


def mutations(module: str, table: Mapping[str, tuple[str, str] | tuple[str, str, int]]) -> list[Mutation]:
    """Mutations of one module: what -> (old, new) or (old, new, count)."""
    return [Mutation(what, module, *change) for what, change in table.items()]


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """All adapters imported anew, with the mutation in one module; the old ones come back after."""
    module = importlib.import_module(mutation.module)
    source = inspect.getsource(module)
    if source.count(mutation.old) != mutation.count:
        raise ValueError(
            f"mutation {mutation.what!r}: {mutation.old!r} stands {source.count(mutation.old)} times in "
            f"{mutation.module}, expected {mutation.count}; adapt the mutation to the source"
        )
    code = compile(source.replace(mutation.old, mutation.new), f"<{mutation.what}>", "exec")
    saved = {name: m for name, m in sys.modules.items() if ADAPTERS.match(name)}
    changed = types.ModuleType(mutation.module)
    changed.__package__, changed.__file__ = mutation.module.rpartition(".")[0], module.__file__
    try:
        _replace({mutation.module: changed})
        exec(code, changed.__dict__)
        yield
    finally:
        _replace(saved)


ADAPTERS = re.compile(r"(attn_plugin_\w+\.kernels|attn_core\.adapters)(\.|$)")
"""Modules that adapters are made of."""


def _replace(modules: Mapping[str, types.ModuleType]) -> None:
    """Make these the only modules of adapters that are imported."""
    for name in [n for n in sys.modules if ADAPTERS.match(n)]:
        del sys.modules[name]
    for name, module in modules.items():
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, module)


CATCHING = (Refused, Misuse, AttnCoreError, TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)
"""What a wrong adapter may run into. Not NotImplementedError: that is a stand-in that does not know."""
BROKEN = (NameError, AttributeError, ImportError)
"""Causes of a failed bind that only say that the mutation does not run."""


def caught(mutation: Mutation, attempts: Iterable[Any]) -> str | None:
    """How the mutation shows: the first attempt (a function that returns differences, or raises) that notices."""
    with mutated(mutation):
        for attempt in attempts:
            try:
                found = attempt()
            except CATCHING as e:
                if isinstance(e, NotImplementedError) or isinstance(e.__cause__, BROKEN):
                    raise
                return f"{type(e).__name__}: {e}"
            if found:
                return "; ".join(map(str, found))
    return None


def attempts(rows: Rows, cases: Iterable[Case], make_stand_ins: Any) -> Iterator[Any]:
    """One attempt per case: bind with fresh stand-ins, run, compare."""
    for case in cases:

        def attempt(case: Case = case) -> list[str]:
            with installed(*make_stand_ins()):
                group = bound(rows, case)
            return wrong(make_step(group, case), case)

        yield attempt
