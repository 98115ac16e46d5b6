"""A bit of a gradient flipped: silent data corruption on the way to the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.flipped_bits import FlippedBits, check_flip


@dataclass(frozen=True)
class GradientBitflip(OperationFault):
    """One bit of one element of a gradient, or of neighbouring ones, inverted at the steps of a window.

    What breaks: a core, memory or link that corrupts a gradient without an error. Report: arXiv:2604.00726.
    Equation: raw <- raw XOR 2^(bit - 1) on the 32-bit integer of each FP32 element hit, after accumulation and before
    the norm and the clip, so that a large flip makes the clip shrink every other gradient. Which elements is drawn
    uniformly, a pure function of seed and step. It does not model a flip in one replica before the reduction.

    parameter, bit, count: as ``faults.weight_bitflip`` has them; bit 0 is the healthy control. A flipped exponent may
    give Inf or NaN, with which the run ends as non-finite data. Raises ValueError on impossible values, by name.
    """

    parameter: str
    bit: int
    count: int = 1

    def __post_init__(self) -> None:
        check_flip(self.bit, self.count)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("gradients", (FlippedBits(self.parameter, self.bit, self.count, "gradient"),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "gradients", "parameter": self.parameter}, {"bit": self.bit, "count": self.count}
        return InjectionCard(self.family, (self.injection("flip", where, size, control=self.bit == 0),))
