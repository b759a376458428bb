"""Domains are sets: intersection is intersection of members, whatever the spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core import ANY, MultipleOf, NoneOf, OneOf
from attn_core.domain import Domain, domain
from attn_core.errors import DeclarationError

NUMBERS = st.integers(0, 300)
DOMAINS = st.one_of(
    st.just(ANY),
    st.lists(NUMBERS, max_size=6).map(lambda v: OneOf(*v)),
    st.lists(NUMBERS, min_size=1, max_size=4).map(lambda v: NoneOf(*v)),
    st.builds(MultipleOf, st.integers(1, 48), st.none() | st.integers(1, 100), st.none() | st.integers(100, 300)),
)


@given(DOMAINS, DOMAINS, NUMBERS)
def test_intersection_is_that_of_the_members(a, b, x):
    assert (x in (a & b)) == (x in a and x in b)


@given(DOMAINS, DOMAINS, DOMAINS, NUMBERS)
def test_intersection_is_associative_and_closed(a, b, c, x):
    left, right = (a & b) & c, a & (b & c)
    assert isinstance(left, Domain)
    assert (x in left) == (x in right)


@given(st.lists(NUMBERS, unique=True, min_size=1), DOMAINS)
def test_the_left_operand_keeps_its_order(values, d):
    both = OneOf(*values) & d
    assert list(both.values) == [v for v in values if v in d]


@given(DOMAINS)
def test_any_is_neutral(d):
    assert [x for x in range(301) if x in (d & ANY)] == [x for x in range(301) if x in d]


def test_true_is_not_one():
    assert True not in OneOf(1)
    assert 1 not in OneOf(True)
    assert True not in MultipleOf(1)
    assert OneOf(True, 1).values == (True, 1)


@pytest.mark.parametrize(
    ("d", "text"),
    [
        (OneOf(16, 32, 64), "16, 32 or 64"),
        (OneOf(64), "64"),
        (OneOf(), "nothing"),
        (MultipleOf(16, max=256), "multiples of 16 from 16 up to 256"),
        (NoneOf("kernel"), "anything but kernel"),
        (MultipleOf(8) & NoneOf(24), "multiples of 8 from 8 except 24"),
        (ANY, "anything"),
    ],
)
def test_domains_read_as_sentences(d, text):
    assert str(d) == text


def test_repr_can_be_evaluated():
    for d in (OneOf(1, "a"), NoneOf(3), MultipleOf(4, min=8, max=64), MultipleOf(4) & NoneOf(8), ANY):
        assert eval(repr(d)) == d


def test_shorthand():
    assert domain(True) == ANY
    assert domain([64, 128]) == OneOf(64, 128)
    assert domain((192, 128)) == OneOf((192, 128))
    assert domain("NHD") == OneOf("NHD")
    assert domain(False) == OneOf(False)
    with pytest.raises(DeclarationError, match="cannot read"):
        domain({"a": 1})
    with pytest.raises(DeclarationError, match="positive step"):
        MultipleOf(0)
