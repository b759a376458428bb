"""No adapter of any vendor keeps state outside its plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulators.purity import state

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted(ROOT.glob("plugins/*/src/*/kernels/**/*.py"))


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: str(p.relative_to(ROOT / "plugins")))
def test_adapters_keep_no_state(path):
    assert state(path.read_text(encoding="utf-8")) == []


def test_there_are_adapters_to_read():
    assert len(ADAPTERS) > 3


STATE = {
    "a dict of the module": "WORKSPACES = {}",
    "a list of the module": "x: list[int] = []",
    "a tensor of the module": "BUFFER = torch.zeros(1)",
    "a global": "def f():\n    global x\n    x = 1",
    "a mutable default": "def f(x, seen={}):\n    pass",
    "a cached function": "@functools.cache\ndef f(x):\n    pass",
    "a cache with a size": "@lru_cache(maxsize=None)\ndef f(x):\n    pass",
    "a cache made by hand": "g = lru_cache(f)",
    "a class attribute": "class A:\n    plans = {}",
    "a class attribute set later": "class A:\n    pass\ndef f():\n    A.plan = 1",
    "a function attribute": "def f():\n    f.plan = 1",
    "a weak dict of the module": "VIEWS = WeakKeyDictionary()",
}
STATELESS = """
from operator import attrgetter
LIMIT = 128 << 20
NAMES = ("a", *MORE)
step_of = attrgetter("decode")
class Names(NamedTuple):
    a: str
V1 = Names("x")
class Step:
    __slots__ = ["a"]
    rows: int
    def __init__(self):
        self.a = {}
def f(x=None, y=(1, 2)):
    seen = {}
    def g():
        return seen
    return g
"""


@pytest.mark.parametrize("what", STATE)
def test_state_is_noticed(what):
    assert state(STATE[what])


def test_what_is_no_state_passes():
    assert state(STATELESS) == []
