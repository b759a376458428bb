"""The adapters' calls through torch's own dispatcher, by the schemas that torch_npu registers.

``op_schemas.json`` holds them as they stand in the wheel. Here torch reads them, so an argument of the wrong type, under
a wrong name, by position where it goes by name, or missing is refused as on a machine with an NPU.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import captured
import pytest
import test_ascend_atb
import torch
from test_ascend_adapters import GRID, MLA, ROWS, materialised
from test_ascend_graphs import GRID as GRAPHS

from attn_plugin_ascend.kernels import launches
from simulators import ascend_npu
from simulators.contract import Function
from simulators.harness import Case, Rows, bound, make_step, mutated, mutations
from simulators.standin import StandIn, installed

FACTS = json.loads(Path(__file__).with_name("op_schemas.json").read_text(encoding="utf-8"))
SCHEMAS: dict[str, str] = FACTS["schemas"]
WHEEL = "TORCH_NPU_WHEEL"
NAMES = {"Device": "device"}
"""Schemas' names of types that Python writes otherwise."""


class Dispatched(ascend_npu.Npu):
    """The stand-in behind torch's dispatcher: every operator is one with the real schema."""

    def __init__(self, library: torch.library.Library) -> None:
        super().__init__()
        self.library = library
        for dotted, function in self.contract.functions.items():
            if function.kind == "torch_op":
                library.impl(name_of(dotted), super()._function(function), "CompositeExplicitAutograd")

    def _function(self, function: Function) -> Callable[..., Any]:
        if function.kind != "torch_op":
            return super()._function(function)
        name = name_of(function.name)
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(getattr(torch.ops, self.library.ns), packet), overload or "default")
        types = {a.name: str(a.type) for a in torch._C.parse_schema(SCHEMAS[name]).arguments}

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(types, args)), **kwargs}
            wrong = [n for n, value in given.items() if not is_a(value, types.get(n, ""))]
            if wrong:
                raise TypeError(f"npu_by_schema::{name}: {', '.join(f'{n} is no {types.get(n)}' for n in wrong)}")
            return operator(*args, **kwargs)

        return call


def name_of(dotted: str) -> str:
    """``torch.ops.npu.x.out`` is ``x.out`` in its schema."""
    return dotted.split(".", 3)[3]


def is_a(value: Any, written: str) -> bool:
    """Whether a value is what a schema's type says, without what torch would convert: a tensor of lengths is read on
    the host, number by number, each a wait for the device."""
    if written.startswith("Optional["):
        return value is None or is_a(value, written[9:-1])
    if written == "List[int]":
        return isinstance(value, list) and all(type(n) is int for n in value)
    if written == "List[Tensor]":
        return isinstance(value, list) and all(isinstance(t, torch.Tensor) for t in value)
    if isinstance(value, torch.dtype):
        return written == "int"  # how schemas name ScalarType
    return (
        isinstance(value, torch.Tensor) if written == "Tensor" else type(value).__name__ == NAMES.get(written, written)
    )


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatched]:
    library = torch.library.Library("npu_by_schema", "FRAGMENT")
    for schema in SCHEMAS.values():
        library.define(schema)
    made = Dispatched(library)
    monkeypatch.setattr(ascend_npu, "stand_in", lambda: made)
    yield made
    library._destroy()


def run(npu: StandIn, case: Case, rows: Rows = ROWS) -> None:
    with installed(npu):
        made = make_step(bound(rows, case), case)
    made.run(return_lse=case.lse)


def test_every_call_of_the_grids_passes_the_dispatcher(npu):
    for case in [*GRID, *MLA]:
        run(npu, case)
    assert not materialised()
    for case in test_ascend_atb.GRID:
        run(npu, case, test_ascend_atb.ROWS)
    for case in (GRAPHS[0], GRAPHS[4], GRAPHS[7]):
        assert not captured.wrong(ROWS, case, npu, steps=captured.STEPS[:2])
    assert {name_of(name) for name, _ in npu.calls if ".ops." in name} == set(SCHEMAS)


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
    functions = ascend_npu.stand_in().contract.functions
    (function,) = (f for n, f in functions.items() if f.kind == "torch_op" and name_of(n) == name)
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

    ``pip download --no-deps --dest /tmp/npu torch-npu==2.10.0.post4`` (or 2.13.0), then
    ``TORCH_NPU_WHEEL=$(echo /tmp/npu/*.whl) python -m pytest -m slow tests/plugins_ascend/test_ascend_schemas.py``.
    """
    path = os.environ.get(WHEEL)
    if not path:
        pytest.skip(f"{WHEEL} names no torch-npu wheel; see this test's docstring")
    wheel, alone = ZipFile(path), FACTS["schemas_of_one"]
    libraries = [wheel.read(f"torch_npu/lib/{name}.so") for name in ("libtorch_npu", "libop_plugin_atb")]
    for name, schema in SCHEMAS.items():
        pattern = rb"\0(" + re.escape(name.encode()) + rb"\([^\0]*\) -> [^\0]+)\0"
        found = {text for library in libraries for text in re.findall(pattern, library)}
        if name not in alone["names"] or f"-{alone['version']}-" in path:
            assert found == {schema.encode()}, name


@pytest.mark.slow
def test_the_runtime_is_that_of_the_wheel():
    """The same for what stands in the wheel as Python: streams, events, graphs and task groups."""
    path = os.environ.get(WHEEL)
    if not path:
        pytest.skip(f"{WHEEL} names no torch-npu wheel; see the test above")
    wheel = ZipFile(path)
    trees = {m: ast.parse(wheel.read(f"torch_npu/npu/{m}.py")) for m in ("graphs", "streams", "utils")}
    for dotted, function in ascend_npu.stand_in().contract.functions.items():
        if function.kind == "torch_op" or not dotted.startswith("torch_npu.npu."):
            continue
        _, _, module, *names = dotted.split(".")
        (definition,) = _definitions(trees[module].body, [*names, "__new__"] if function.kind == "class" else names)
        arguments = [
            a.arg for a in (*definition.args.args, *definition.args.kwonlyargs) if a.arg not in ("self", "cls")
        ]
        named = [n for n, p in function.signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
        assert arguments == named, dotted
    exported = wheel.read("torch_npu/npu/__init__.py").decode()
    for name in launches.Runtime._fields:
        assert re.search(rf"\b{name}\b", exported), name
    assert "_weak_ref_tensor" in wheel.read("torch_npu/npu/graphs.py").decode()


def _definitions(body: list[ast.stmt], names: list[str]) -> list[Any]:
    """Functions of that name in the classes of those names; inherited ones stand for themselves in C++."""
    here = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == names[0]]
    return here if len(names) == 1 else [d for n in here for d in _definitions(n.body, names[1:])]
