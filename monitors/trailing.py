"""Functions whose formulas stand on trailing axes, for ``torch.vmap`` to call as they are.

A monitor that is ``stackable`` is run by vmap over stacked runs. vmap rewrites every operation for its own axis, which
fails where code looks at a value, and rounds otherwise, or costs more, where it replaces an operation by others. A
function that takes any leading axes needs no rewriting: vmap's axis is one more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found", bound=Tensor | tuple[Tensor, ...])


def on_trailing_axes(function: Callable[..., Found]) -> Callable[..., Found]:
    """Let vmap call ``function`` once, its axis in front of all others.

    function: of tensors (..., *) and of anything else, positionally, to a tensor (..., *) or a tuple of such, with the
    same leading axes throughout or axes that broadcast to them. A tensor without vmap's axis gets it as one of size 1.
    No gradients flow through it.
    """

    class Trailing(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Found:
            return function(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Found, Any]:
            def in_front(argument: Any, axis: int | None) -> Any:
                if not isinstance(argument, Tensor):
                    return argument
                return argument[None] if axis is None else argument.movedim(axis, 0)

            found = Trailing.apply(*map(in_front, arguments, in_dims))
            return found, 0 if isinstance(found, Tensor) else (0,) * len(found)

    @wraps(function)
    def called(*arguments: Any) -> Found:
        return Trailing.apply(*arguments)

    return called
