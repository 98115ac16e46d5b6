"""The markers of tests: each is registered, used, told to contributors, and on the tests that it is for."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = {
    line.partition(":")[0]
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
}
PYTESTS = {"filterwarnings", "parametrize", "skip", "skipif", "usefixtures", "xfail"}

STARTED = {
    "e2e": {"-m experiments.train", "-m experiments.reproduce"},
    "triton": {"run_triton", "flash_attention_triton"},
}
"""Commands and functions that a test of a marker may call."""


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """Every file of tests, parsed where a test asks: a process that only collects tests need not."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "tests").rglob("*.py"))}


def marks(nodes: Iterable[ast.AST]) -> set[str]:
    """The names after ``pytest.mark`` anywhere in these."""
    inside = (node for top in nodes for node in ast.walk(top) if isinstance(node, ast.Attribute))
    return {node.attr for node in inside if isinstance(node.value, ast.Attribute) and node.value.attr == "mark"}


def functions() -> Iterator[tuple[str, set[str], set[str]]]:
    """Every test, its marks, and in its body, which a fixture's is not, the names and the modules after ``-m``."""
    for path, tree in trees().items():
        of_file = [node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.dump(node)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                inside = [part for statement in node.body for part in ast.walk(statement)]
                names = {part.id for part in inside if isinstance(part, ast.Name)}
                pairs = [pair for part in inside if isinstance(part, ast.List) for pair in pairwise(part.elts)]
                commands = {" ".join(map(ast.literal_eval, pair)) for pair in pairs if are_texts(pair)}
                yield f"{path.name}: {node.name}", marks([*of_file, *node.decorator_list]), names | commands


def are_texts(nodes: Iterable[ast.AST]) -> bool:
    return all(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes)


def test_the_markers_that_tests_use_are_the_registered_ones():
    assert marks(trees().values()) - PYTESTS == OWN == {"e2e", "numeric", "slow", "triton"}


@pytest.mark.parametrize("marker", sorted(OWN))
def test_contributors_are_told_of_every_marker(marker):
    assert f"`{marker}`" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("marker", sorted(STARTED))
def test_a_test_carries_the_marker_of_what_it_starts(marker):
    wanted = {name: own for name, own, used in functions() if used & STARTED[marker]}
    assert wanted and [name for name, own in wanted.items() if marker not in own] == []
