"""The tensors of attention's dot products in one step, as a kernel received and returned them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.models.attention import DotProduct
from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import Tap


@dataclass(frozen=True)
class DotProductStep:
    """The tensors of some layers' dot products in one step.

    q, o, dq, do: (B, H, T, D); k, v, dk, dv: (B, G, T, D), FP32 or FP64, as the kernel receives and returns them;
    window: how many keys a query sees, None for all before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    do: Tensor
    window: int | None = None

    @classmethod
    def of(cls, taps: Sequence[Tap[DotProduct]], rows: slice = slice(None)) -> DotProductStep:
        """From the taps on the dot products of some layers, of one window, their batch rows after one another."""

        def together(tensors: Iterable[Tensor]) -> Tensor:
            return at_least_fp32(torch.cat([x[rows] for x in tensors]))

        stored = taps[0].module.stored
        q, k, v = (stored(together(tap.inputs[index] for tap in taps)) for index in range(3))
        dq, dk, dv = (together(tap.input_grads[index] for tap in taps) for index in range(3))
        do = stored(together(tap.dout for tap in taps))
        return cls(q, k, v, together(tap.out for tap in taps), dq, dk, dv, do, taps[0].module.window)
