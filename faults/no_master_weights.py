"""Weights without a master copy in FP32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Moment
from foreshock.faults.rounding import nearest, stochastic_bf16

ROUNDINGS = ("nearest", "stochastic", "none")


@dataclass(frozen=True)
class RoundedWeights(OfGroup):
    """The weights of a group rounded to BF16 after the update. rounding: of ``ROUNDINGS``."""

    rounding: str

    @property
    def idle(self) -> bool:
        return self.rounding == "none"

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        return nearest(x, "bf16") if self.rounding == "nearest" else stochastic_bf16(x, moment)


@dataclass(frozen=True)
class NoMasterWeights(OperationFault):
    """The weights are kept in BF16 at the steps of a window: an update below half a unit in the last place vanishes.

    What breaks: an optimizer that updates BF16 weights in place. Source: arXiv:2010.06192, with stochastic rounding as
    its cure.
    Equation: w <- round(w) after the update, which itself is computed in FP32; ``nearest`` ties to even, ``stochastic``
    to a neighbour whose probability makes the mean w. Gradients and moments stay FP32. The first faulty update starts
    from FP32 weights.

    rounding: of ``ROUNDINGS``, ``none`` is the healthy control; group: of ``PARAMETER_GROUPS``, or None for all. Raises
    ValueError on impossible values, by name.
    """

    rounding: str = "nearest"
    group: str | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"fault.rounding={self.rounding!r} is not allowed: one of {', '.join(ROUNDINGS)}")
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("weights", (RoundedWeights(self.group, self.rounding),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "weights", "group": self.group}, {"format": "bf16", "rounding": self.rounding}
        return InjectionCard(self.family, (self.injection("round", where, size, control=self.rounding == "none"),))
