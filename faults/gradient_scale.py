"""Gradients of one parameter group scaled: dropped, turned round, or counted several times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Moment


@dataclass(frozen=True)
class ScaledGradients(OfGroup):
    """g <- factor g for every parameter of a group."""

    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        return x * self.factor


@dataclass(frozen=True)
class GradientScale(OperationFault):
    """The gradient of a parameter group times a factor, at the steps of a window.

    What breaks: gradients of some parameters that are left out of the all-reduce, reduced twice or divided by a wrong
    count. Report: NVIDIA/Megatron-LM #1446 (gradients of norms that were not reduced).
    Equation: g <- factor g after accumulation, before the global norm and the clip: 0 drops the gradient, -1 turns it
    round, and 1 is the healthy control. The factor of tensors whose reduction is missing varies by rank and step in
    the real system; here it is one number. Adam divides by the size of the gradient: a constant positive factor on
    all parameters changes hardly more than what the clip does.

    group: one of ``models.transformer.PARAMETER_GROUPS``, or None for every parameter; factor: finite.
    Raises ValueError on impossible values, by name.
    """

    factor: float
    group: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ValueError(f"fault.factor={self.factor} is not allowed: a finite number")
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("gradients", (ScaledGradients(self.group, self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "gradients", "group": self.group}, {"factor": self.factor}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
