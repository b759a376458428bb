"""The example engine against transformers: equal tokens, wrong models noticed, pages really reused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from gpt_oss_tiny import generate_eager, make_model, make_prompts
from paged_engine import Engine, PagedDecoder, Request, negative_controls, serve

from attn_core import Batch, ModelSpec, get_platform

PROMPTS = make_prompts(7, longest=30, seed=2)
MAX_NEW = [8 + 5 * (i % 3) for i in range(len(PROMPTS))]
POOL = {"full": 18, "sliding": 14}
WINDOW = 10


@pytest.fixture(scope="module")
def model():
    return make_model(window=WINDOW)


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return [generate_eager(model, p, n) for p, n in zip(PROMPTS, MAX_NEW)]


def run(model, **changes):
    return serve(model, PROMPTS, MAX_NEW, platform=get_platform("cpu"), **{"num_pages": POOL, **changes})


def test_tokens_equal_eager_generation_on_reused_pages(model, expected):
    got, stats = run(model)
    assert got == expected
    assert len({t for out in expected for t in out}) >= 20
    assert max(len(p) + n for p, n in zip(PROMPTS, MAX_NEW)) > 3 * WINDOW
    assert len({len(p) for p in PROMPTS}) > 4
    assert stats.mixed_steps > 3
    assert stats.preemptions > 0
    for pool, demand, reused in stats.pages.values():
        assert pool < demand / 2
        assert reused > pool


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 1, "num_pages": {"full": 60, "sliding": 48}},
        {"page_size": 16, "token_budget": 7, "num_pages": {"full": 7, "sliding": 5}},
        {"token_budget": 200, "max_seqs": 16, "num_pages": {"full": 99, "sliding": 99}},
        {"max_seqs": 1},
    ],
    ids=["pages of one", "small budget", "all at once", "one by one"],
)
def test_scheduling_changes_no_token(model, expected, changes):
    assert run(model, **changes)[0] == expected


@pytest.mark.parametrize("name", ["sinks dropped", "window one short", "scale 1% off"])
def test_wrong_models_are_noticed(model, expected, name):
    wrong = negative_controls(ModelSpec.from_hf_config(model.config))[name]
    assert run(model, spec=wrong)[0] != expected


def engine(model, **changes) -> Engine:
    attn = get_platform("cpu").attention_backend(ModelSpec.from_hf_config(model.config), page_size=4)
    settings = {"token_budget": 24, "max_seqs": 6, **changes}
    return Engine(PagedDecoder(model, attn, POOL), POOL, **settings)


def test_plans_are_refilled_tables_permuted_and_the_null_page_stays_zero(model):
    made, tables, kinds = set(), [], set()
    e = engine(model)

    def tick(_: int) -> None:
        made.update((name, id(plan)) for name, plan in e.plans.items())
        tables.extend(r.pages["full"] for r in e.running)
        kinds.update(type(plan.batch) for plan in e.plans.values())

    e.run([Request(list(p), n) for p, n in zip(PROMPTS, MAX_NEW)], tick)
    assert kinds == {Batch}
    assert len(made) == 2
    assert any(a > b for table in tables for a, b in pairwise(table))
    assert all(page > 0 for table in tables for page in table)
    for cache in e.decoder.caches:
        assert all(not part[0].any() for part in cache.data)
    for pool in e.pools.values():
        assert sorted(pool.free) == list(range(1, pool.size + 1))


def test_a_request_that_can_never_fit_is_refused(model):
    with pytest.raises(ValueError, match="do not hold the longest request"):
        engine(model).run([Request([1] * 60, 30)])
