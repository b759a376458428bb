"""Joint solving agrees with full enumeration over kinds, and with plain resolving where there is one kind."""

from __future__ import annotations

import random

from brute_joint import JointBrute, question
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core import Decision, NoBackendError
from attn_core.resolve import resolve
from attn_core.resolve.joint import Joint, Member, resolve_jointly

SEEDS = st.integers(0, 2**32 - 1)


def answer(members, model, options):
    joint = Joint(members, model, options)
    solved = joint.solve()
    if solved is None:
        return None
    fits, mask = solved
    names = []
    for space, fit in zip(joint.spaces, fits):
        if space.spaces[0].group is None:
            names.append([tuple(c.spec.backend for c in combination.picks) for combination in fit.picks])
        else:
            names.append([tuple(map(_shown, combination.picks)) for combination in fit.picks])
    sides = len({m.roles for m in members})
    assignments = [a for b, a in enumerate(joint.shared.assignments) if mask >> b & 1]
    return names, {(a[:sides], *a[sides:]) for a in assignments}


def _shown(c):
    return c.spec.backend, c.spec.plugin, None if c.spec.role == "kv_write" else c.widths[0]


def expected(members, model, options):
    solved = JointBrute(members, model, options).solve()
    return None if solved is None else solved[1:]


@settings(max_examples=250, deadline=None)
@given(SEEDS)
def test_same_answer_as_full_enumeration(seed):
    q = question(seed)
    assert answer(*q) == expected(*q)


def test_generated_questions_are_not_trivial():
    answers = [answer(*question(seed)) for seed in range(500)]
    solved = [a for a in answers if a is not None]
    assert 120 < len(solved) < 480
    kinds_differ = [a for a in solved if any(len({str(n) for n in names}) > 1 for names in a[0])]
    assert len(kinds_differ) > 20
    alone = 0
    for seed in range(500):
        members, model, options = question(seed)
        each = [answer([m], model, options) for m in members]
        alone += answers[seed] is None and all(e is not None for e in each)
    assert alone > 5  # some fleets have no answer although each of their kinds has one


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_one_kind_gets_what_resolve_gives(seed):
    members, model, options = question(seed)
    m = Member(**{**vars(members[0]), "roles": None})
    assert _text(lambda: resolve_jointly([m], model, options)[0]) == _text(
        lambda: resolve(m.device, model, options, m.catalog, m.installed)
    )


def _text(ask) -> str:
    try:
        return ask().dumps()
    except NoBackendError as e:
        return e.code


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_what_ranks_share_is_equal_and_decisions_travel(seed):
    members, model, options = question(seed)
    try:
        decisions = resolve_jointly(members, model, options)
    except NoBackendError as e:
        error = e
    else:
        error = None
    if error is not None:
        assert all("; rank " in r.text for r in error.rejections)
        assert error.text
        return
    for name in ("page_size", "kv_cache_dtype"):
        assert len({d.values.get(name) for d in decisions}) == 1
    for roles in {m.roles for m in members}:
        mine = [d for m, d in zip(members, decisions) if m.roles == roles]
        assert len({d.values["graph"] for d in mine}) == 1
        assert len({d.roles["allreduce_fusion"].backend for d in mine}) == 1
    for name, g in model.groups.items():
        if g.cached:
            found = [d.groups[name].values for d in decisions if name in d.groups]
            assert len({(v["kv_layout"], v["head_dim"]) for v in found}) == 1
    for d in decisions:
        assert Decision.from_json(d.dumps()).digest == d.digest
        assert d.explain(verbose=True)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.randoms(use_true_random=False))
def test_asking_twice_and_relabelling_ranks_changes_nothing(seed, r: random.Random):
    members, model, options = question(seed)
    renamed = [Member(**{**vars(m), "where": f"ranks {i + 7}"}) for i, m in enumerate(members)]
    assert answer(members, model, options) == answer(renamed, model, options)
