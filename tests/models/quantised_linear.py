"""Linear layers that multiply FP8 or INT8 numbers, as quantised training does, in PyTorch's FP32 and BF16 products."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0
"""Of E4M3."""


class StraightThrough(torch.autograd.Function):
    """x on E4M3's grid, scaled so that its largest number fits, by a power of 2; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scale = torch.exp2(torch.floor(torch.log2(LARGEST / x.abs().amax())))
        return (x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class OneScaleARow(torch.autograd.Function):
    """Each row on 255 whole multiples of its own step, which is no power of 2: BF16 rounds such numbers again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class INT8Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(OneScaleARow.apply(x), OneScaleARow.apply(self.weight))


class FP8Linear(nn.Linear):
    """Multiplies and returns FP32, or BF16 where the input is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(StraightThrough.apply(x), StraightThrough.apply(self.weight))


class FP8InBF16(FP8Linear):
    """Returns BF16, as PyTorch's scaled product does by default."""

    def forward(self, x: Tensor) -> Tensor:
        operands = StraightThrough.apply(x), StraightThrough.apply(self.weight)
        return F.linear(*(operand.bfloat16() for operand in operands))


class OfItsOwn(torch.autograd.Function):
    """A product whose backward is its own, which nothing outside can follow."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, -2).T @ x.flatten(0, -2)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return OfItsOwn.apply(x, self.weight)


def replaced(model: nn.Module, kind: type[nn.Linear], leave: tuple[str, ...] = ()) -> nn.Module:
    """The model with another forward in its linear layers, but those whose names end in ``leave``."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith(leave or ("\0",)):
            module.__class__ = kind
    return model
