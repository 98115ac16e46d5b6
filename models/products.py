"""What a linear layer multiplied: the two operands of its matrix product, seen inside its forward.

Autocast, a weight's parametrization or a module that quantises in its own forward multiplies something else than the
module's input and weight. PyTorch shows every function that a module calls to a ``TorchFunctionMode``; the operands are
taken from there. Nothing is computed again, and no bit of training changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foreshock.models.anatomies.structure import lies_transposed
from foreshock.models.moe import GroupedLinear

ROWS, COLUMNS = "rows", "columns"

PRODUCTS: Mapping[Callable[..., Any], tuple[int, str]] = {
    F.linear: (0, ROWS),
    **{
        function: (0, COLUMNS)
        for function in (torch.mm, torch.bmm, torch.matmul, Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)
    },
    **{function: (1, COLUMNS) for function in (torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)},
}
"""Matrix products: where their operands begin, and whether an output is a row of the second, (out, in), or a column."""


@dataclass
class Product:
    """The operands of the one product of a linear layer in one step, detached.

    dtype: what they were multiplied in; x, w: the operands in the layout of the module's input and weight, or None
    where they are that input and weight in this dtype; dx, dw: the gradients at x and w through this product alone,
    where those are given. unseen: why the product is not known, or None.
    """

    dtype: torch.dtype | None = None
    x: Tensor | None = None
    w: Tensor | None = None
    dx: Tensor | None = None
    dw: Tensor | None = None
    unseen: str | None = None


class Call(NamedTuple):
    """One product: its operands, how the second lies, what they are multiplied in, and whether PyTorch's own backward
    follows."""

    x: Tensor
    w: Tensor
    layout: str
    dtype: torch.dtype
    followed: bool


@dataclass
class Watching(TorchFunctionMode):
    """Notes the operands of every matrix product while it is open."""

    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, function: Callable, types: Sequence[type], arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if function in PRODUCTS:
            first, layout = PRODUCTS[function]
            operands = arguments[first : first + 2]
            if len(operands) == 2 and all(isinstance(operand, Tensor) for operand in operands):
                followed = torch.is_grad_enabled() and operands[1].requires_grad
                self.calls.append(Call(*operands, layout, multiplied_in(operands[1]), followed))
        return function(*arguments, **(named or {}))


def multiplied_in(operand: Tensor) -> torch.dtype:
    """The dtype in which a product takes an operand: autocast's where that is on, which leaves FP64 alone."""
    device = operand.device.type
    if torch.is_autocast_enabled(device) and operand.is_floating_point() and operand.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return operand.dtype


def product_of(module: nn.Linear | GroupedLinear, given: Tensor, seen: Watching) -> Product:
    """The product of a linear layer's forward. given: its input; seen: what was noted meanwhile.

    Gradients at operands arrive in the backward. ``unseen`` where the forward made no product that PyTorch shows, or
    several, one whose backward is the module's own, or one of operands that are padded, cut or the other way round.
    """
    own_forward = "forward" in vars(module)
    if type(module).forward is GroupedLinear.forward and not own_forward:
        # a grouped product is shown to nobody; it casts as autocast does
        return Product(multiplied_in(module.weight))
    if len(seen.calls) != 1:
        return Product(unseen=f"it makes {len(seen.calls) or 'no'} matrix products that can be seen, not one")
    call = seen.calls[0]
    if not call.followed:
        return Product(unseen="its product is inside an autograd function of its own")
    as_given = partial(torch.reshape, shape=given.shape)
    as_weight = _transposed if lies_transposed(module) == (call.layout == ROWS) else _same
    if call.x.numel() != given.numel() or as_weight(call.w).shape != module.weight.shape:
        return Product(unseen="its operands are not shaped as its input and weight")
    product = Product(call.dtype)
    if not isinstance(module.weight, nn.Parameter) or not _is(as_weight(call.w), module.weight, call.dtype):
        product.w = as_weight(call.w.detach().to(call.dtype))
        call.w.register_hook(lambda gradient: setattr(product, "dw", as_weight(gradient.detach())))
    if not _is(as_given(call.x), given, call.dtype):
        product.x = as_given(call.x.detach().to(call.dtype))
        if call.x.requires_grad:
            call.x.register_hook(lambda gradient: setattr(product, "dx", as_given(gradient.detach())))
    return product


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _is(operand: Tensor, whole: Tensor, dtype: torch.dtype) -> bool:
    """Whether an operand is a tensor of the module, or that tensor cast to the product's dtype."""
    if operand.shape != whole.shape:
        return False
    same_memory = operand.dtype == whole.dtype and operand.data_ptr() == whole.data_ptr()
    if same_memory and operand.stride() == whole.stride():
        return True
    return torch.equal(operand.detach().to(dtype), whole.detach().to(dtype))
