"""A bit of a weight flipped once: silent data corruption in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.flipped_bits import FlippedBits, check_flip


@dataclass(frozen=True)
class WeightBitflip(OperationFault):
    """One bit of one weight, or of a row of neighbouring weights, inverted at the steps of a window: by default once.

    What breaks: memory or a core that corrupts data without an error. Reports: Dixit et al., arXiv:2102.11245;
    LMResiliency/lm-resiliency, which injects it into training.
    Equation: raw <- raw XOR 2^(bit - 1) on the 32-bit integer of each FP32 weight hit, after the update, so that the
    next forward is the first to read it. Which weights is drawn uniformly, a pure function of seed and step. The
    optimizer's state stays right, and it trains on from the wrong weight. It does not model a bit that sticks (every
    later update writes over it) or replicas that disagree.

    parameter: a name of ``named_parameters()``, such as ``blocks.0.attention.q.weight`` (a tied head's is
    ``tokens.weight``); bit: from below, 1 to 23 of the significand, 24 to 31 of the exponent, 32 the sign, or 0 for the
    healthy control; count: how many neighbours in row-major order. A flipped exponent may give Inf or NaN, with which
    the run ends as non-finite data. Raises ValueError on impossible values, by name.
    """

    parameter: str
    bit: int
    count: int = 1

    def __post_init__(self) -> None:
        check_flip(self.bit, self.count)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("weights", (FlippedBits(self.parameter, self.bit, self.count, "weight"),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "weights", "parameter": self.parameter}, {"bit": self.bit, "count": self.count}
        return InjectionCard(self.family, (self.injection("flip", where, size, control=self.bit == 0),))
