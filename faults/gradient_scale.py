"""Gradients of one parameter group scaled: dropped, turned round, or counted several times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Moment, Operation, Training
from foreshock.models.transformer import PARAMETER_GROUPS, TransformerConfig, parameter_group, skeleton


@dataclass(frozen=True)
class ScaledGradients(Operation):
    """g <- factor g for every parameter of a group of ``models.transformer.PARAMETER_GROUPS``, or of all for None."""

    group: str | None
    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if not self.touches(name for name, _ in skeleton(model).named_parameters()):
            raise ValueError(f"fault.group={self.group!r} has no effect: the model has no parameter of that group")

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.group is None or parameter_group(name) == self.group]

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
        if self.group is not None and self.group not in PARAMETER_GROUPS:
            raise ValueError(
                f"fault.group={self.group!r} is not allowed: one of {', '.join(PARAMETER_GROUPS)}, or null for all"
            )
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("gradients", (ScaledGradients(self.group, self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "gradients", "group": self.group}, {"factor": self.factor}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
