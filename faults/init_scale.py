"""Matrices that start with a wrong standard deviation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Moment


@dataclass(frozen=True)
class ScaledMatrices(OfGroup):
    """W <- factor W for every matrix of a group; norms, which start as ones and zeros, have no standard deviation."""

    stackable: ClassVar[bool] = False

    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in super().touches(names) if "norm." not in name]

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        return x * self.factor


@dataclass(frozen=True)
class InitScale(OperationFault):
    """The matrices of a parameter group times a factor before the forward of a step, by default the run's first.

    What breaks: an initialisation that leaves out a scale, or applies one twice. No public report is known.
    Equation: W <- factor W, so that a group drawn from N(0, sigma^2) is one from N(0, (factor sigma)^2). The label's
    reading at step 0, and weights that monitors recorded there, are of the matrices before. A later onset scales
    trained matrices, as a checkpoint does that is converted wrongly.

    factor: above 0, finite; 1 is the healthy control; group: of ``models.transformer.PARAMETER_GROUPS`` but ``norm``,
    or None for all. Raises ValueError on impossible values, by name.
    """

    factor: float
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: above 0, finite")
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("start", (ScaledMatrices(self.group, self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "start", "group": self.group}, {"factor": self.factor}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
