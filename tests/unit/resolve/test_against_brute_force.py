"""The resolver agrees with full enumeration: same key, same backends, same set of allowed values."""

from __future__ import annotations

import random
from dataclasses import replace

from brute import Brute
from generate import BETA, question, row
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.catalog import Catalog, DeviceCatalog
from attn_core.resolve import Problem

SEEDS = st.integers(0, 2**32 - 1)


def answer(devices, model, options, catalog, installed):
    """(key parts, names and widths per space, allowed shared assignments) of the real resolver, or None."""
    problem = Problem(devices.get("", devices), model, options, catalog, installed)
    solved = problem.solve()
    if solved is None:
        return None
    key, chosen, mask = solved
    names = []
    for space, combination in zip(problem.spaces, chosen):
        if space.group is None:
            names += [(c.spec.backend,) for c in combination.picks]
        else:
            names.append(tuple((c.spec.backend, c.spec.plugin, _width(c)) for c in combination.picks))
    allowed = {a for b, a in enumerate(problem.shared.assignments) if mask >> b & 1}
    return (list(key[0]), list(key[1]), *key[2:5]), names, allowed


def _width(candidate):
    """The kernel width of an attention row; writers take any width of the group."""
    return None if candidate.spec.role == "kv_write" else candidate.widths[0]


def expected(devices, model, options, catalog, installed):
    solved = Brute(devices, model, options, catalog, installed).solve()
    if solved is None:
        return None
    total, names, allowed = solved
    width = lambda w: None if isinstance(w, frozenset) else w  # noqa: E731
    shown = [tuple((b, p, width(w)) for b, p, w in n) if len(n[0]) == 3 else n for n in names]
    return tuple(total[:5]), shown, allowed


@settings(max_examples=2500, deadline=None)
@given(SEEDS)
def test_same_answer_as_full_enumeration(seed):
    q = question(seed)
    assert answer(*q) == expected(*q)


def test_generated_questions_are_not_trivial():
    """The comparison can fail: many questions have answers, many have none, constraints and pins matter."""
    answers = [answer(*question(seed)) for seed in range(400)]
    solved = [a for a in answers if a is not None]
    assert 120 < len(solved) < 380
    assert len({str(a) for a in solved}) > 100
    changed = 0
    for seed in range(400):
        devices, model, options, catalog, installed = question(seed)
        free = Catalog({k: DeviceCatalog(d.backends) for k, d in catalog.devices.items()})
        changed += answer(devices, model, options, free, installed) != answers[seed]
    assert changed > 20


@settings(max_examples=300, deadline=None)
@given(SEEDS, st.randoms(use_true_random=False))
def test_declaration_order_changes_nothing(seed, r):
    devices, model, options, catalog, installed = question(seed)
    shuffled = {}
    for k, d in catalog.devices.items():
        rows, rules = list(d.backends), list(d.constraints)
        r.shuffle(rows)
        r.shuffle(rules)
        shuffled[k] = DeviceCatalog(tuple(rows), tuple(rules))
    assert answer(devices, model, options, Catalog(shuffled), installed) == answer(
        devices, model, options, catalog, installed
    )


@settings(max_examples=300, deadline=None)
@given(SEEDS)
def test_a_foreign_plugin_changes_nothing(seed):
    """Declarations for another device, and constraints of a plugin that takes no part, leave every decision alone."""
    devices, model, options, catalog, installed = question(seed)
    r = random.Random(seed + 1)
    extended = {}
    for k, d in catalog.devices.items():
        strangers = tuple(replace(c, plugin="stranger") for c in d.constraints)
        extended[k] = DeviceCatalog(d.backends, (*d.constraints, *strangers))
    extended["gamma:g1"] = DeviceCatalog(tuple(row(r, "decode", BETA, "gamma") for _ in range(3)))
    assert answer(devices, model, options, Catalog(extended), installed) == answer(
        devices, model, options, catalog, installed
    )


@settings(max_examples=300, deadline=None)
@given(SEEDS)
def test_adding_a_row_without_constraints_never_worsens_the_required_tiers(seed):
    devices, model, options, catalog, installed = question(seed)
    before = answer(devices, model, options, catalog, installed)
    r = random.Random(seed + 2)
    device = next(iter(devices.values()))
    role = r.choice(sorted({role for g in model.groups.values() for role in g.roles}))
    new = row(r, role, device, "newcomer")
    old = catalog.devices[str(device)]
    more = {**catalog.devices, str(device): DeviceCatalog((*old.backends, new), old.constraints)}
    after = answer(devices, model, options, Catalog(more), installed)
    if before is not None:
        assert after is not None
        assert after[0][0] <= before[0][0]


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_resolving_twice_is_the_same_and_pins_are_honoured(seed):
    q = question(seed)
    first = answer(*q)
    assert answer(*q) == first
    if first is not None:
        options = q[2]
        for graph, kv, page in first[2]:
            assert options.graph in (None, graph)
            assert page is None or options.page_size in (None, page)
            assert kv is None or options.kv_cache_dtype in (None, kv)
