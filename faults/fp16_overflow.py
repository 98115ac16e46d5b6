"""The loss scale of FP16 training jumps, and gradients overflow until it has backed off."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.loss_scale import ScaleOperation

MOST = 2.0**64


@dataclass(frozen=True)
class Fp16Overflow(OperationFault):
    """The loss scale is multiplied by a factor before the faulty updates; the scaler goes on from there.

    What breaks: a scale that is too large for the gradients of FP16, so that they overflow and updates are skipped one
    after the other. Report: arXiv:1710.03740, where gradients under too large a scale overflow FP16, and such updates
    are skipped.
    Equation: S <- factor S once before each faulty update, as long as S stays an FP32 number. From there it is the
    scaler of PyTorch: an update whose gradients are NaN or Inf is skipped and halves S, 2,000 in a row without overflow
    double it. So a jump skips about log2(factor S / S_max) updates, S_max the largest scale without overflow, and a
    factor that stays below S_max / S skips none. A scale that is far too small loses gradients to underflow instead.
    Gradients of all other updates are unscaled and differ by FP16's rounding alone. It does not model a scaler that
    never backs off, nor an overflow that no check meets and that reaches the weights.

    factor: 2^-64 to 2^64, best a power of two; 1 is the healthy control. It needs train.precision=fp16. Raises
    ValueError on impossible values, by name.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 1 / MOST <= self.factor <= MOST:
            raise ValueError(f"fault.factor={self.factor} is not allowed: 2^-64 to 2^64; 1 is the healthy control")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("scaling", (ScaleOperation(self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "scaling", "tensor": "scale"}, {"factor": self.factor}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
