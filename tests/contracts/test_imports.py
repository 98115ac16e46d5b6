"""Which module imports which, from the syntax trees: no circle, rooms of analysis import down only, no torch there."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("faults", "models", "monitors", "experiments", "analysis")
ROOMS = ("runs", "detect", "scores", "locate", "probes", "figures", "reports")
"""Folders of analysis, the lowest first: each may import itself and those before it. Its commands are above all."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def named_modules(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands: nested ones and TYPE_CHECKING ones count.

    ``from a import b`` names ``a.b`` where that is a module, else ``a``. ``foreshock.a`` is ``a``.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("foreshock.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            outer = node.module.removeprefix("foreshock.")
            for alias in node.names:
                inner = f"{outer}.{alias.name}".removeprefix("foreshock.")
                yield inner if inner in SOURCES else outer


@functools.cache
def named() -> dict[str, set[str]]:
    """By module, those that it names. Read where a test asks: a process that only collects tests need not."""
    return {module: set(named_modules(path)) for module, path in SOURCES.items()}


def graph_of_ours() -> dict[str, list[str]]:
    return {module: sorted((names & SOURCES.keys()) - {module}) for module, names in named().items()}


def a_circle(graph: Mapping[str, list[str]]) -> list[str] | None:
    """Modules that import each other, each the next and the last the first; None where there is no circle."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        circles = (search(other, [*path, module]) for other in graph[module])
        circle = next((circle for circle in circles if circle), None)
        done.add(module)
        return circle

    return next((circle for module in graph if (circle := search(module, []))), None)


def room(module: str) -> str:
    """The room of a module of analysis; ``commands`` for those that lie in no folder."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "commands"


def test_arrows_are_seen():
    graph = graph_of_ours()
    assert {"analysis.scores.contest", "experiments.trace"} <= set(graph["analysis.report"])
    assert sum(map(len, graph.values())) > 3 * len(graph)


def test_no_module_imports_itself_through_others():
    assert a_circle(graph_of_ours()) is None


def test_a_circle_is_found():
    assert a_circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert a_circle({"a": ["b", "c"], "b": ["c"], "c": []}) is None


@pytest.mark.parametrize("lower", ROOMS)
def test_rooms_of_analysis_import_down_only(lower):
    above = {*ROOMS[ROOMS.index(lower) + 1 :], "commands"}
    arrows = {
        f"{module} -> {other}"
        for module, others in graph_of_ours().items()
        for other in others
        if module.startswith(f"analysis.{lower}.") and other.startswith("analysis.") and room(other) in above
    }
    assert not arrows


def test_every_folder_of_analysis_is_a_room():
    folders = {path.parent.name for path in (ROOT / "analysis").glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_analysis_imports_no_torch():
    """Neither itself nor through a module of ours."""
    graph = graph_of_ours()
    reached = [module for module in graph if module.startswith("analysis")]
    for module in reached:
        reached += [other for other in graph[module] if other not in reached]
    assert not [module for module in reached if any(name.split(".")[0] == "torch" for name in named()[module])]
