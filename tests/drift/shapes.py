"""Reads what another project's sources look like, without importing them: a folder of packages, or a wheel.

A *seam* is ``module:name`` or ``module:Class.name``. Its shape is a list of words: a function's parameters
(``name``, ``name=`` with a default, ``*args``, ``**kwargs``, ``*`` and ``/``), a class's fields and members, or nothing
for a plain name. Names that a module imports from elsewhere are followed.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any


class MissingError(Exception):
    """A module or name is not there."""


class Sources:
    """Packages below a folder (``site-packages``), or inside a wheel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._zip = zipfile.ZipFile(root) if root.is_file() else None
        self._trees: dict[str, tuple[ast.Module, bool]] = {}

    def _read(self, path: str) -> str | None:
        try:
            if self._zip is not None:
                return self._zip.read(path).decode()
            return (self.root / path).read_text(encoding="utf-8")
        except (KeyError, FileNotFoundError, NotADirectoryError):
            return None

    def module(self, name: str) -> tuple[ast.Module, bool]:
        """The parsed module, and whether it is a package."""
        if name not in self._trees:
            base = name.replace(".", "/")
            for path, package in ((f"{base}/__init__.py", True), (f"{base}.py", False)):
                text = self._read(path)
                if text is not None:
                    self._trees[name] = ast.parse(text), package
                    break
            else:
                raise MissingError(f"module {name} is gone")
        return self._trees[name]

    def version(self, *distributions: str) -> str:
        """Version in the metadata of the first of these distributions found, else ``unknown``."""
        names = {d.replace("-", "_").lower() for d in distributions}
        if self._zip is not None:
            infos = [n for n in self._zip.namelist() if n.endswith(".dist-info/METADATA")]
        else:
            infos = [p.relative_to(self.root).as_posix() for p in self.root.glob("*.dist-info/METADATA")]
        for path in sorted(infos):
            if path.split("-")[0].lower() in names:
                return str(HeaderParser().parsestr(self._read(path) or "")["Version"])
        return "unknown"

    def has(self, package: str) -> bool:
        return self._read(f"{package}/__init__.py") is not None

    def find(self, module: str, name: str, depth: int = 0) -> Any:
        """The node that defines a top-level name, following imports; a path of a module for a submodule."""
        tree, package = self.module(module)
        found: Any = None
        for node in _statements(tree.body):
            if name in _defined(node):
                found = node
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and depth < 8:
                        found = self._follow(node, alias.name, module, package, depth)
        found = found or self._starred(tree, module, package, name, depth)
        if found is None and package:
            try:
                return self.module(f"{module}.{name}")[0]
            except MissingError:
                return self._lazy(tree, module, name, depth)
        if found is None:
            raise MissingError(f"{module} has no {name}")
        return found

    def _starred(self, tree: ast.Module, module: str, package: bool, name: str, depth: int) -> Any:
        """Through ``import *``; where a package has very many, those whose name is in the one we look for."""
        stars = [n for n in _statements(tree.body) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
        for node in stars if depth < 8 else ():
            if len(stars) > 20 and (node.module or "").replace("_", "") not in name.lower():
                continue
            try:
                return self._follow(node, name, module, package, depth)
            except MissingError:
                continue
        return None

    def _follow(self, node: ast.ImportFrom, name: str, module: str, package: bool, depth: int) -> Any:
        parts = module.split(".")
        keep = len(parts) - node.level + (1 if package else 0)
        base = parts[:keep] if node.level else []
        target = ".".join([*base, *([node.module] if node.module else [])])
        try:
            return self.find(target, name, depth + 1)
        except MissingError:
            return self.module(f"{target}.{name}")[0]

    def _lazy(self, tree: ast.Module, module: str, name: str, depth: int) -> Any:
        """Packages that import lazily list their names as strings: {"submodule": ["Name"]} or {"Name": ".sub:Name"}."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict) and depth < 8:
                for key, value in zip(node.keys, node.values):
                    words = [c.value for c in ast.walk(value) if isinstance(c, ast.Constant)]
                    sub = key.value if isinstance(key, ast.Constant) else None
                    if name in words and isinstance(sub, str) and sub.isidentifier() | ("." in sub):
                        return self.find(f"{module}.{sub}", name, depth + 1)
                    if sub == name and words and isinstance(words[0], str):
                        target = words[0].partition(":")[0].lstrip(".")
                        return self.find(f"{module}.{target}", name, depth + 1)
        raise MissingError(f"{module} has no {name}")

    def shape(self, seam: str) -> list[str]:
        """See above. Raises :class:`MissingError`."""
        module, _, path = seam.partition(":")
        node: Any = self.module(module)[0] if not path else None
        for i, name in enumerate(path.split(".") if path else ()):
            node = self.find(module, name) if i == 0 else self._member(module, node, name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return parameters(node.args)
        return members(node) if isinstance(node, ast.ClassDef) else []

    def _member(self, module: str, node: Any, name: str) -> Any:
        for n in _statements(getattr(node, "body", [])):
            if getattr(n, "name", None) == name or (isinstance(n, ast.Assign | ast.AnnAssign) and name in _targets(n)):
                return n
        for base in getattr(node, "bases", []):
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                try:
                    return self._member(module, self.find(module, base.id), name)
                except MissingError:
                    continue
        raise MissingError(f"{module}: {getattr(node, 'name', '?')} has no {name}")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those under ``if``, ``try`` and ``with`` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    return _targets(node) if isinstance(node, ast.Assign | ast.AnnAssign) else []


def _targets(node: Any) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def parameters(a: ast.arguments) -> list[str]:
    plain = [*a.posonlyargs, *a.args]
    defaults = [False] * (len(plain) - len(a.defaults)) + [True] * len(a.defaults)
    words = [p.arg + ("=" if d else "") for p, d in zip(plain, defaults)]
    if a.posonlyargs:
        words.insert(len(a.posonlyargs), "/")
    if a.vararg:
        words.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        words.append("*")
    words += [p.arg + ("=" if d is not None else "") for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return [*words, f"**{a.kwarg.arg}"] if a.kwarg else words


def members(node: ast.ClassDef) -> list[str]:
    """Fields and enum members, in order; ``name=`` has a default or a value."""
    out = []
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            out.append(n.target.id + ("=" if n.value is not None else ""))
        elif isinstance(n, ast.Assign):
            out += [f"{t}=" for t in _targets(n)]
    return [w for w in out if not w.startswith("_")]


def moved(recorded: list[str], found: list[str]) -> list[str]:
    """What changed, in words."""
    gone, new = [w for w in recorded if w not in found], [w for w in found if w not in recorded]
    out = []
    names = {w.strip("*=/") for w in found}
    for w in gone:
        at = recorded.index(w)
        here = found[at] if at < len(found) else None
        if w.strip("=") in names:
            out.append(f"{w.strip('=')} {'lost' if w.endswith('=') else 'gained'} its default")
            new = [n for n in new if n.strip("=") != w.strip("=")]
        elif here in new and len(found) == len(recorded):
            out.append(f"{w} is now called {here}")
            new.remove(here)
        else:
            out.append(f"{w} is gone")
    out += [f"{w} is new" for w in new]
    if not out and recorded != found:
        out.append(f"the order changed: {', '.join(recorded)} -> {', '.join(found)}")
    return out


def drift(host: str, recorded: dict[str, Any], sources: Sources) -> list[str]:
    """One line per seam that is not as recorded: which version of the host moved what."""
    version = sources.version(*recorded["distributions"])
    out = []
    for seam, shape in recorded["seams"].items():
        try:
            changes = moved(shape, sources.shape(seam)) if shape is not None else []
            if shape is None:
                sources.shape(seam)
        except MissingError as e:
            changes = [str(e)]
        out += [f"{host} {version} (recorded from {recorded['version']}): {seam}: {c}" for c in changes]
    return out
