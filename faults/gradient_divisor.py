"""The sum of gradients divided by a wrong count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.gradient_scale import ScaledGradients


@dataclass(frozen=True)
class GradientDivisor(OperationFault):
    """The gradient of the whole batch divided by another count than its own, at the steps of a window.

    What breaks: gradients of micro-batches that are added up and not divided by their number, or divided by a count of
    sequences where that of tokens is right. Reports: axolotl #2262; huggingface/transformers #34191.
    Equation: g <- factor g for every parameter, before the norm and the clip; factor = right count / used count, so
    that N micro-batches without a division are a factor of N. 1 is the healthy control. It does not model counts that
    differ between micro-batches, which would weight some sequences more than others; a clip that is reached hides it.

    factor: above 0, finite. Raises ValueError on impossible values, by name.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: above 0, finite")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("gradients", (ScaledGradients(None, self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "gradients", "group": None}, {"factor": self.factor}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
