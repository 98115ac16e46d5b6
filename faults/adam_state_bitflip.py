"""A bit of one of Adam's moments flipped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.adam_state import FlippedMoment, check_moment
from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.flipped_bits import check_flip


@dataclass(frozen=True)
class AdamStateBitflip(OperationFault):
    """One bit of one element of a moment, or of neighbouring ones, inverted before the updates of a window.

    What breaks: memory that corrupts optimizer state without an error. Report: LMResiliency/lm-resiliency.
    Equation: raw <- raw XOR 2^(bit - 1) on the 32-bit integer of each FP32 element hit, before the update reads it.
    Which elements is drawn uniformly, a pure function of seed and step. A flipped sign of v gives the root of a
    negative number, NaN. It does not model a bit that sticks.

    moment: ``exp_avg`` or ``exp_avg_sq``; parameter, bit, count: as ``faults.weight_bitflip`` has them; bit 0 is the
    healthy control; the first faulty update is after the run's first, which has no state yet. Raises ValueError on
    impossible values, by name.
    """

    parameter: str
    bit: int
    moment: str = "exp_avg"
    count: int = 1

    def __post_init__(self) -> None:
        check_flip(self.bit, self.count)
        check_moment(self.moment)
        super().__post_init__()
        if self.window.first == 0:
            raise ValueError("fault.onset=0 is not allowed: the run's first update has no moments yet; at least 1")

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (FlippedMoment(self.parameter, self.bit, self.count, self.moment),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "optimizer", "parameter": self.parameter, "tensors": (self.moment,)}
        size = {"bit": self.bit, "count": self.count}
        return InjectionCard(self.family, (self.injection("flip", where, size, control=self.bit == 0),))
