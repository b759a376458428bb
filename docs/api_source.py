"""Public names as Markdown, read from source text: signature, docstring, fields and methods.

Signatures are cut out of the source, not formatted from objects, so every Python prints the same, and neither torch nor
the modules themselves are imported.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import attn_core

PACKAGE = Path(attn_core.__file__).parent

Function = ast.FunctionDef | ast.AsyncFunctionDef
Assignment = ast.Assign | ast.AnnAssign


# reading


@dataclass(frozen=True)
class Source:
    """A module as text and as a tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def doc(self) -> str:
        return prose(ast.get_docstring(self.tree) or "")

    def cut(self, node: ast.AST | None) -> str:
        """The source of an expression on one line."""
        return " ".join((ast.get_source_segment(self.text, node) or "").split()) if node is not None else ""


@cache
def source(module: str) -> Source:
    """A module of attn_core by its dotted name."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    return Source(module, text, ast.parse(text))


@dataclass(frozen=True)
class Definition:
    """Where a name is defined, and what it says of itself."""

    name: str
    where: Source
    node: ast.ClassDef | Function | Assignment

    @property
    def doc(self) -> str:
        """The docstring, or the string after an assignment; empty where there is none."""
        if isinstance(self.node, ast.ClassDef | Function):
            return prose(ast.get_docstring(self.node) or "")
        return dict(_with_docs(self.where.tree.body)).get(self.node, "")


def find(module: str, name: str) -> Definition:
    """The definition of a name, followed through imports. Raises LookupError for a name that is not there."""
    where = source(module)
    for node in _statements(where.tree.body):
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return Definition(name, where, node)
        if isinstance(node, Assignment) and name in _targets(node):
            return Definition(name, where, node)
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return find(node.module, name)
    raise LookupError(f"{module} defines no {name}")


def public_names(module: str) -> list[str]:
    """``__all__``, or the functions that a module without one defines and does not hide."""
    body = source(module).tree.body
    for node in body:
        if isinstance(node, ast.Assign) and _targets(node) == ["__all__"]:
            return [str(name) for name in ast.literal_eval(node.value)]
    return [n.name for n in body if isinstance(n, Function) and not n.name.startswith("_")]


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If):  # if TYPE_CHECKING
            yield from _statements(node.body)


def _targets(node: Assignment) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t.id if isinstance(t, ast.Name) else t.attr for t in targets if isinstance(t, ast.Name | ast.Attribute)]


def _with_docs(body: Sequence[ast.stmt]) -> Iterator[tuple[Assignment, str]]:
    """Assignments with the string that follows them."""
    for node, after in zip(body, (*body[1:], None)):
        if isinstance(node, Assignment):
            said = after.value if isinstance(after, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
            yield node, prose(inspect.cleandoc(text))


def _called(node: ast.expr) -> str:
    """The last name of a decorator: ``dataclass`` of ``@dataclasses.dataclass(frozen=True)``."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# formatting


def prose(doc: str) -> str:
    """A docstring as Markdown: literals, roles, literal blocks, and definition lists as bullets."""
    doc = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", doc)
    doc = re.sub(r"^(``[^\n]+)\n((?: {4}[^\n]+\n?)+)", _bullet, doc, flags=re.MULTILINE)
    return doc.replace("``", "`").replace("::\n", ":\n")


def _bullet(found: re.Match[str]) -> str:
    return f"* {found[1]}: {' '.join(found[2].split())}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one after it; none for no rows."""
    body = [f"| {' | '.join(' '.join(c.split()).replace('|', chr(92) + '|') for c in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body, ""] if body else []


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def signature(f: Function, where: Source, name: str | None = None, *, bound: bool = False, width: int = 100) -> str:
    """``name(a: int, *, b: str = 'x') -> bool``, on several lines when longer than ``width``.

    ``bound`` leaves out the first parameter.
    """
    a = f.args
    plain = [*a.posonlyargs, *a.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(a.defaults)), *a.defaults]
    parts = [_parameter(arg, default, where) for arg, default in zip(plain, defaults)]
    if a.posonlyargs:
        parts.insert(len(a.posonlyargs), "/")
    if bound:
        parts = parts[1:]
    if a.vararg:
        parts.append("*" + _parameter(a.vararg, None, where))
    elif a.kwonlyargs:
        parts.append("*")
    parts += [_parameter(arg, default, where) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        parts.append("**" + _parameter(a.kwarg, None, where))
    end = f" -> {where.cut(f.returns)}" if f.returns is not None and f.name != "__init__" else ""
    short = f"{name or f.name}({', '.join(parts)}){end}"
    if len(short) <= width:
        return short
    return "\n".join([f"{name or f.name}(", *(f"    {p}," for p in parts), f"){end}"])


def _parameter(arg: ast.arg, default: ast.expr | None, where: Source) -> str:
    kind = f": {where.cut(arg.annotation)}" if arg.annotation is not None else ""
    value = where.cut(default)
    return arg.arg + kind + (f" = {value}" if value and kind else f"={value}" if value else "")


def _fenced(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


# one name


def entry(d: Definition, known: Mapping[str, str]) -> list[str]:
    """Heading, signature, docstring and members. ``known`` says what fields mean that do not say it themselves."""
    out = [f"### {d.name}", ""]
    if isinstance(d.node, Function):
        out += _fenced(signature(d.node, d.where))
    if isinstance(d.node, ast.ClassDef):
        return [*out, *_class(d.name, d.node, d.where, d.doc, known)]
    return [*out, d.doc, ""]


def _class(name: str, node: ast.ClassDef, where: Source, doc: str, known: Mapping[str, str]) -> list[str]:
    bases = ", ".join(where.cut(b) for b in node.bases)
    decorators = [f"@{where.cut(d)}" for d in node.decorator_list]
    init = next((f for f in node.body if isinstance(f, Function) and f.name == "__init__"), None)
    head = [f"class {name}({bases})"] if bases else [] if init else [f"class {name}"]
    head += [signature(init, where, name, bound=True)] if init else []
    out = [*_fenced(*decorators, *head), doc, ""]
    attributes = [(n, said) for n, said in _with_docs(node.body) if not _targets(n)[0].startswith("_")]
    if any(_called(d) == "dataclass" for d in node.decorator_list):
        rows = [
            (
                code(field := _targets(n)[0]),
                code(where.cut(n.annotation)),
                _default(n, where),
                said or known.get(field, ""),
            )
            for n, said in attributes
            if isinstance(n, ast.AnnAssign)
        ]
        out += table(("field", "type", "default", ""), rows)
        attributes = [(n, said) for n, said in attributes if isinstance(n, ast.Assign)]
    members = [_member(_attribute(n, where), said) for n, said in attributes]
    members += [_member(*_method(shown, f, where)) for shown, f in _methods(node)]
    return [*out, *members, ""]


def _default(node: ast.AnnAssign, where: Source) -> str:
    """A field's default as code; words for what has none."""
    value = node.value
    if not (isinstance(value, ast.Call) and _called(value) == "field"):
        return code(where.cut(value)) or "required"
    given = {k.arg: where.cut(k.value) for k in value.keywords}
    if given.get("init") == "False":
        return "derived"
    return code(given["default"] if "default" in given else f"{given['default_factory']}()")


def _attribute(node: Assignment, where: Source) -> str:
    name = _targets(node)[0]
    if isinstance(node, ast.AnnAssign):
        return f"{name}: {where.cut(node.annotation)}"
    return f"{name} = {where.cut(node.value)}"


def _methods(node: ast.ClassDef) -> Iterator[tuple[str, Function]]:
    """Public methods; and functions that ``__init__`` stores under a public name (``self.plan = self._plan``)."""
    own = [f for f in node.body if isinstance(f, Function)]
    yield from ((f.name, f) for f in own if not f.name.startswith("_"))
    hidden = {f.name.removeprefix("_"): f for f in ast.walk(node) if isinstance(f, Function) and f.name[:2] != "__"}
    for init in (f for f in own if f.name == "__init__"):
        stored = [name for n in init.body if isinstance(n, Assignment) for name in _targets(n)]
        yield from ((name, hidden[name]) for name in stored if name in hidden)


def _method(name: str, f: Function, where: Source) -> tuple[str, str]:
    doc = prose(ast.get_docstring(f) or "")
    if {_called(d) for d in f.decorator_list} & {"property", "cached_property"}:
        return f"{name}: {where.cut(f.returns)}", doc
    bound = any(a.arg in ("self", "cls") for a in [*f.args.posonlyargs, *f.args.args][:1])
    return signature(f, where, name, bound=bound, width=1000), doc


def _member(shown: str, doc: str) -> str:
    text = "\n".join(f"  {line}".rstrip() for line in doc.splitlines())
    return f"* {code(shown)}" + (f": {text.lstrip()}" if text else "")
