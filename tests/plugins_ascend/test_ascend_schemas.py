"""The adapters' calls through torch's own dispatcher, by the schemas that torch_npu registers.

``op_schemas.json`` holds them as they stand in the wheel. Here torch reads them, so an argument of the wrong type, under
a wrong name, by position where it goes by name, or missing is refused as on a machine with an NPU.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from test_ascend_adapters import GRID, MLA, ROWS, materialised

from simulators import ascend_npu
from simulators.contract import Function
from simulators.harness import Case, bound, make_step, mutated, mutations
from simulators.standin import StandIn, installed

FACTS = json.loads(Path(__file__).with_name("op_schemas.json").read_text(encoding="utf-8"))
SCHEMAS: dict[str, str] = FACTS["schemas"]
WHEEL = "TORCH_NPU_WHEEL"


class Dispatched(StandIn):
    """The stand-in behind torch's dispatcher: every function is an operator with the real schema."""

    def __init__(self, library: torch.library.Library) -> None:
        plain = ascend_npu.stand_in()
        super().__init__("torch_npu", plain.answers)
        self.library = library
        for dotted in self.contract.functions:
            name = dotted.rpartition(".")[2]
            library.impl(name, self._answer(dotted), "CompositeExplicitAutograd")

    def _answer(self, dotted: str) -> Callable[..., Any]:
        return super()._function(self.contract.functions[dotted])

    def _function(self, function: Function) -> Callable[..., Any]:
        name = function.name.rpartition(".")[2]
        operator = getattr(getattr(torch.ops, self.library.ns), name)
        types = {a.name: str(a.type) for a in torch._C.parse_schema(SCHEMAS[name]).arguments}

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(types, args)), **kwargs}
            wrong = [n for n, value in given.items() if not is_a(value, types.get(n, ""))]
            if wrong:
                raise TypeError(f"npu_by_schema::{name}: {', '.join(f'{n} is no {types.get(n)}' for n in wrong)}")
            return operator(*args, **kwargs)

        return call


def is_a(value: Any, written: str) -> bool:
    """Whether a value is what a schema's type says, without what torch would convert: a tensor of lengths is read on
    the host, number by number, each a wait for the device."""
    if written.startswith("Optional["):
        return value is None or is_a(value, written[9:-1])
    if written == "List[int]":
        return isinstance(value, list) and all(type(n) is int for n in value)
    return isinstance(value, torch.Tensor) if written == "Tensor" else type(value).__name__ == written


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatched]:
    library = torch.library.Library("npu_by_schema", "FRAGMENT")
    for schema in SCHEMAS.values():
        library.define(schema)
    made = Dispatched(library)
    monkeypatch.setattr(ascend_npu, "stand_in", lambda: made)
    yield made
    library._destroy()


def run(npu: StandIn, case: Case) -> None:
    with installed(npu):
        made = make_step(bound(ROWS, case), case)
    made.run(return_lse=case.lse)


def test_every_call_of_the_grid_passes_the_dispatcher(npu):
    for case in [*GRID, *MLA]:
        run(npu, case)
    assert not materialised()
    assert {name.rpartition(".")[2] for name, _ in npu.calls} == set(SCHEMAS)


@pytest.mark.parametrize(
    "mutation",
    mutations(
        "attn_plugin_ascend.kernels.fia",
        {
            "lengths on the device": ("batch.kv_lens.tolist()", "batch.kv_lens_device"),
            "scale as a tensor": ("names.scale: b.scale", "names.scale: torch.ones(2)"),
            "heads as a tuple": ("names.heads: b.num_heads", "names.heads: (b.num_heads,)"),
            "another version's word": ('"softmax_lse_flag",\n', '"return_softmax_lse",\n'),
        },
    ),
    ids=lambda m: m.what,
)
def test_wrong_arguments_are_refused(npu, mutation):
    with mutated(mutation), pytest.raises((RuntimeError, TypeError), match="npu_by_schema"):
        run(npu, GRID[0])


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_stand_in_has_the_signature_of_the_schema(name):
    function = ascend_npu.stand_in().contract.functions[f"torch.ops.npu.{name}"]
    empty = inspect.Parameter.empty
    wanted = [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else empty)
        for a in torch._C.parse_schema(SCHEMAS[name]).arguments
    ]
    has = [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in function.signature.parameters.values()]
    assert has == wanted


@pytest.mark.slow
def test_the_schemas_are_those_of_the_wheel():
    """Reads the strings that a wheel's library registers; nothing of it is imported or run.

    ``pip download --no-deps --dest /tmp/npu torch-npu==2.13.0``, then
    ``TORCH_NPU_WHEEL=$(echo /tmp/npu/*.whl) python -m pytest -m slow tests/plugins_ascend/test_ascend_schemas.py``.
    """
    path = os.environ.get(WHEEL)
    if not path:
        pytest.skip(f"{WHEEL} names no torch-npu wheel; see this test's docstring")
    library = ZipFile(path).read("torch_npu/lib/libtorch_npu.so")
    for name, schema in SCHEMAS.items():
        found = set(re.findall(rb"\0(" + name.encode() + rb"\([^\0]*\) -> [^\0]+)\0", library))
        assert found == {schema.encode()}, name
