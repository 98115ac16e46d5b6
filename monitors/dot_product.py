"""The tensors of attention's dot products in one step, as a kernel received and returned them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foreshock.models.attention import DotProduct
from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import Tap
from foreshock.monitors.unreadable import Unreadable

TENSORS = ("q", "k", "v", "o", "dq", "dk", "dv", "do")


@dataclass(frozen=True)
class DotProductStep:
    """The tensors of some layers' dot products in one step.

    q, o, dq, do: (B, H, T, D); k, v, dk, dv: (B, G, T, D), FP32 or FP64, as the kernel receives and returns them;
    window: how many keys a query sees, None for all before it; scale: of q k^T, None for 1 / sqrt(D).
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
    scale: float | None = None

    @property
    def factor(self) -> float:
        """What scores are q k^T times."""
        return 1 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale

    @property
    def over_factor_squared(self) -> float:
        """1 / factor^2: D where the scale is 1 / sqrt(D)."""
        return self.q.shape[-1] if self.scale is None else 1 / self.scale**2

    def double(self) -> DotProductStep:
        """The same in FP64."""
        return replace(self, **{name: getattr(self, name).double() for name in TENSORS})

    @classmethod
    def of(cls, taps: Sequence[Tap[DotProduct]], rows: slice = slice(None)) -> DotProductStep:
        """From the taps on the dot products of some layers, of one window, their batch rows after one another."""

        def together(tensors: Iterable[Tensor]) -> Tensor:
            return at_least_fp32(torch.cat([x[rows] for x in tensors]))

        call = taps[0].known_call
        if any(tap.known_call != call for tap in taps):
            raise Unreadable("its layers call attention with different kernels, scales or windows")
        obstacle = next((tap.known_call.obstacle for tap in taps if tap.known_call.obstacle), None)
        if obstacle is not None:
            raise Unreadable(f"attention cannot be computed again: {obstacle}")
        if any(len(tap.input_grads) < 3 or tap.output_grad is None for tap in taps):
            raise Unreadable("no gradient reaches its q, k, v or o")
        stored = call.stored
        q, k, v = (stored(together(tap.inputs[index] for tap in taps)) for index in range(3))
        dq, dk, dv = (together(tap.input_grads[index] for tap in taps) for index in range(3))
        do = stored(together(tap.dout for tap in taps))
        return cls(q, k, v, together(tap.out for tap in taps), dq, dk, dv, do, call.window, call.scale)
