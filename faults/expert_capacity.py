"""A capacity of experts that is too small: tokens are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.expert_operations import CutCapacity


@dataclass(frozen=True)
class ExpertCapacity(OperationFault):
    """The capacity factor of every layer's experts times a factor, at the steps of a window.

    What breaks: a capacity that is computed from a wrong count of tokens or experts. Source: arXiv:2101.03961 (section
    2.2). Equation: an expert takes at most ceil(factor c N K / E) of a batch's N K slots, with the model's capacity
    factor c, and drops those that come last; a dropped slot leaves its token to the residual stream. Held-out losses
    are taken with the same capacity while the fault acts. Priorities among tokens are not modelled.

    factor: above 0, at most 1, the healthy control. Raises ValueError on impossible values, by name.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(f"fault.factor={self.factor} is not allowed: above 0, at most 1, the healthy control")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("modules", (CutCapacity(self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "modules", "modules": None, "tensor": "capacity"}
        injection = self.injection("cut_capacity", where, {"factor": self.factor}, control=self.factor == 1)
        return InjectionCard(self.family, (injection,))
