"""The three products of a linear layer with operands of a narrow format, accumulated in FP32.

y = Q(x) Q(W)^T, dx = Q(dy) Q(W), dW = Q(dy)^T Q(x). The hardware's product is emulated: the operands are the FP32
numbers that the narrow ones stand for, and FP32's own product multiplies them. Its sums are in the order of that
kernel, not of a tensor core, whose loss within its accumulator is not modelled. Hardware multiplies the narrow numbers
and scales their sum; here each operand is scaled back before it is multiplied. A scale that is a power of 2 makes that
exact (but for overflow and underflow). With another one FP32 rounds on the way into the format and on the way back:
of FP8 (``quantised.in_tensor``) x times s, before the format rounds it; then 1/s; then the FP8 number times that 1/s.
Of NVFP4 (``quantised.in_blocks``) it is x divided by the scale, and the FP4 number times the scale. Q has the gradient
of the identity.

Under BF16 autocast the operands are rounded to BF16 before they are quantised, as a cast layer takes them, and y and dx
are rounded to BF16; the product itself is FP32's.

Shapes: N tokens (or slots at experts), I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from foreshock.models.corruption import Replaced
from foreshock.models.moe import GroupedLinear
from foreshock.models.numerics import at_least_fp32
from foreshock.models.precision import as_autocast, outside_autocast

OneQuantiser = Callable[[str, Tensor], Tensor]
"""From ``x``, ``w`` or ``dy`` and the operand of that name to what both products that take it multiply."""

AxisQuantiser = Callable[[str, str, Tensor, int], Tensor]
"""From the operand's name, what is summed over (``inputs``, ``outputs`` or ``tokens``), the operand and that axis."""


def one_quantised(module: nn.Linear | GroupedLinear, quantise: OneQuantiser) -> Callable[..., Tensor]:
    """A forward that quantises each operand once, for both products that take it.

    PyTorch's own product stands in the forward, of operands that anyone can see, and dy is quantised where it arrives,
    before all who read it there: so x, W, dW, y and dy that taps see are what was multiplied, and every law of a linear
    layer holds to FP32 rounding. A module fault of dy changes the quantised one. Experts' grouped product is one whose
    operands PyTorch shows to nobody, and their laws are left out.
    """

    def forward(x: Tensor, *ends: Tensor) -> Tensor:
        given, weight = as_autocast(x, module.weight)
        with outside_autocast(x):
            x_q, w_q = _quantised(given, "x", quantise), _quantised(weight, "w", quantise)
            if isinstance(module, GroupedLinear):
                y = F.grouped_mm(x_q, w_q, offs=ends[0])
            else:
                y = F.linear(x_q, w_q, module.bias)
            y = y.to(given.dtype)
        if y.requires_grad:
            y.register_hook(lambda gradient: quantise("dy", at_least_fp32(gradient)).to(gradient.dtype))
        return y

    return forward


def _quantised(operand: Tensor, name: str, quantise: OneQuantiser) -> Tensor:
    operand = at_least_fp32(operand)
    value = quantise(name, operand.detach())
    quantised: Tensor = Replaced.apply(operand, lambda _: value)
    return quantised


def quantised_by_axis(module: nn.Linear | GroupedLinear, quantise: AxisQuantiser) -> Callable[..., Tensor]:
    """A forward that quantises each operand for each product by itself, along what that product sums over.

    An operand then has two values in one step, of which no law of x, W, dW and dy holds: the product is an autograd
    function of its own, and the monitors of linear layers leave the layer out by name. Each expert's product is one by
    itself, whose blocks of tokens are of its own slots.
    """

    def forward(x: Tensor, *ends: Tensor) -> Tensor:
        given, weight = as_autocast(x, module.weight)
        with outside_autocast(x):
            rows, w = at_least_fp32(given).flatten(0, -2), at_least_fp32(weight)
            if isinstance(module, GroupedLinear):
                starts = [0, *ends[0].tolist()]
                parts = [
                    _ByAxis.apply(rows[start:end], w_IO.mT, quantise)
                    for start, end, w_IO in zip(starts[:-1], starts[1:], w, strict=True)
                ]
                return torch.cat(parts).to(given.dtype)
            y = _ByAxis.apply(rows, w, quantise).unflatten(0, given.shape[:-1])
            return (y if module.bias is None else y + module.bias).to(given.dtype)

    return forward


class _ByAxis(torch.autograd.Function):
    """x (N, I), w (O, I) -> y (N, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, quantise: AxisQuantiser) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.quantise = quantise
        return F.linear(quantise("x", "inputs", x, -1), quantise("w", "inputs", w, -1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        quantise, dx, dw = ctx.quantise, None, None
        if ctx.needs_input_grad[0]:
            dx = quantise("dy", "outputs", dy, -1) @ quantise("w", "outputs", w, 0)
        if ctx.needs_input_grad[1]:
            dw = quantise("dy", "tokens", dy, 0).mT @ quantise("x", "tokens", x, 0)
        return dx, dw, None
