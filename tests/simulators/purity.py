"""Reads adapters' source for state that outlives a call and lies on no plan: groups and batches would share it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

CACHES = {"cache", "lru_cache", "singledispatch"}
FROZEN = (ast.Constant, ast.Name, ast.Attribute, ast.Lambda)
FREEZING = {
    "frozenset",
    "tuple",
    "MappingProxyType",
    "attrgetter",
    "itemgetter",
    "TypeVar",
    "log",
    "sqrt",
    "float",
    "int",
}


def state(source: str) -> list[str]:
    """What a module keeps between calls, as ``line: what``; empty for an adapter without state."""
    tree = ast.parse(source)
    return [f"line {node.lineno}: {what}" for node, what in _found(tree)]


def _found(tree: ast.Module) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    classes = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    values = FREEZING | {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and _is_value(n)}
    for statement in tree.body:
        yield from _mutable(statement, "module", values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node, f"global {', '.join(node.names)}"
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                yield from _mutable(statement, f"class {node.name}", values)
        if isinstance(node, ast.FunctionDef):
            for d in node.decorator_list:
                name = _leaf(d.func if isinstance(d, ast.Call) else d)
                if name in CACHES:
                    yield d, f"{node.name} is cached by {name}"
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                if not _frozen(default, values):
                    yield default, f"{node.name} has the mutable default {ast.unparse(default)}"
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for t in targets:
                if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in classes | functions:
                    yield node, f"sets an attribute of {t.value.id}"
        if isinstance(node, ast.Call) and _leaf(node.func) in CACHES:
            yield node, f"makes a cache: {ast.unparse(node)}"


def _is_value(c: ast.ClassDef) -> bool:
    """A NamedTuple, an Enum or a frozen dataclass."""
    frozen = any("frozen=True" in ast.unparse(d) for d in c.decorator_list)
    return frozen or any(_leaf(b) in ("NamedTuple", "Enum", "IntEnum") for b in c.bases)


def _mutable(statement: ast.stmt, where: str, values: set[str]) -> Iterator[tuple[ast.stmt, str]]:
    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = ", ".join(map(ast.unparse, targets))
        if names != "__slots__" and not _frozen(statement.value, values):
            yield statement, f"{where} holds {names} = {ast.unparse(statement.value)[:60]}"


def _frozen(value: ast.expr, values: set[str]) -> bool:
    """Constants, names, tuples of such, arithmetic on them, and calls of what makes something frozen."""
    if isinstance(value, FROZEN):
        return True
    if isinstance(value, ast.Tuple):
        return all(_frozen(e.value if isinstance(e, ast.Starred) else e, values) for e in value.elts)
    if isinstance(value, ast.UnaryOp):
        return _frozen(value.operand, values)
    if isinstance(value, ast.BinOp):
        return _frozen(value.left, values) and _frozen(value.right, values)
    if isinstance(value, ast.Subscript):  # type aliases
        return True
    return isinstance(value, ast.Call) and _leaf(value.func) in values


def _leaf(f: ast.expr) -> str:
    return f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
