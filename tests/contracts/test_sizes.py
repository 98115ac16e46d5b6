"""A function is short and takes few parameters, in every package; kernels are as long as their arithmetic."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("foreshock", "faults", "models", "monitors", "experiments", "analysis")
MOST_LINES, MOST_PARAMETERS = 60, 8
KERNELS = ("triton.jit", "torch.library.custom_op", "register_fake")
"""Decorators of kernels, and of the operators that launch them, whose tensors and sizes are parameters one by one."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    """Every function of a module, methods and nested ones too, but for kernels."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            decorators = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
            if not any(name.endswith(KERNELS) for name in decorators):
                yield node


def lines(function: Function) -> int:
    """From ``def`` to the last line; decorators do not count."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: Function) -> int:
    """All that a caller may give: not ``self`` or ``cls``; ``*args`` and ``**kwargs`` are one each."""
    of = function.args
    named = [*of.posonlyargs, *of.args]
    own = named[1:] if named and named[0].arg in ("self", "cls") else named
    return len(own) + len(of.kwonlyargs) + sum(part is not None for part in (of.vararg, of.kwarg))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_long_or_takes_many_parameters(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    too_large = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {lines(function)} lines, "
        f"{parameters(function)} parameters"
        for path in files
        for function in functions(path.read_text(encoding="utf-8"))
        if lines(function) > MOST_LINES or parameters(function) > MOST_PARAMETERS
    ]
    assert not too_large, "\n".join(too_large)


def test_lines_and_parameters_are_counted():
    source = """
class A:
    @staticmethod
    async def many(a, b, /, c, *d, e=1, **f):
        def inner():
            pass
        return inner
    def own(self, x): pass
@triton.jit(do_not_specialize=["T"])
def kernel(a, b, c, d, e, f, g, h, i, j): pass
@_forward.register_fake
def outputs(a, b, c, d, e, f, g, h, i, j): pass
"""
    counted = {function.name: (lines(function), parameters(function)) for function in functions(source)}
    assert counted == {"many": (4, 6), "inner": (2, 0), "own": (1, 1)}
