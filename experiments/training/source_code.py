"""What a source file does, apart from how it is written: its syntax without docstrings, comments and annotations."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from foreshock.names import importable, short

ROOT = Path(__file__).resolve().parents[2]


class _Meaning(ast.NodeTransformer):
    """Removes what no statement's effect depends on. A class's annotated fields stay: a dataclass is made of them."""

    def _body(self, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_Module = _body
    _in_class = False

    def _inside(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> ast.AST:
        outside, self._in_class = self._in_class, in_class
        changed = self._body(node)
        self._in_class = outside
        return changed

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._inside(node, True)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._inside(node, False)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """Outside a class ``x: int = 1`` is ``x = 1``, and ``x: int`` nothing."""
        self.generic_visit(node)
        if self._in_class:
            return node
        return None if node.value is None else ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """A string by itself describes what stands above it."""
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)


def meaning_of(source: str) -> str:
    """A source text in one spelling, without what it says to people. Raises SyntaxError."""
    return ast.unparse(_Meaning().visit(ast.parse(source)))


@cache
def _meaning_in(path: Path) -> bytes:
    return meaning_of(path.read_text()).encode()


def digest_of(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over what files do, each under a name that does not depend on where its folder lies."""
    digest = hashlib.sha256()
    for name, path in sorted(set(files)):
        digest.update(name.encode() + b"\0" + _meaning_in(path) + b"\0")
    return digest.hexdigest()


def path_of(module: str) -> Path | None:
    """The source file of a module, None where it has none. Raises ModuleNotFoundError."""
    loaded = sys.modules.get(importable(module))
    origin = getattr(loaded, "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(importable(module))
        origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


@cache
def _imported_by(module: str, path: Path) -> tuple[str, ...]:
    """The modules that a module imports, by absolute name, anywhere in it; a name that it imports may be one itself."""
    names, package = [], module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(map(short, names))


def closure_of(module: str, follow: Callable[[str, Path], bool]) -> Iterator[tuple[str, Path]]:
    """A module and all that it imports, directly or not, as (name, file): those that ``follow`` allows."""
    seen, left = set(), [module]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            path = path_of(name)
        except (ModuleNotFoundError, ValueError):  # a name in a module, not a module
            continue
        if path is None or (name != module and not follow(name, path)):
            continue
        yield name, path
        left += _imported_by(name, path)
