"""The gradient of an earlier update in place of this one's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Moment


@dataclass(frozen=True)
class StaleGradients(OfGroup):
    """The gradient that was computed ``lag`` updates ago, for every tensor of a group."""

    stackable: ClassVar[bool] = False

    lag: int

    @property
    def idle(self) -> bool:
        return self.lag == 0

    @property
    def lookback_steps(self) -> int:
        return self.lag

    def meets(self, other: Any) -> bool:
        return isinstance(other, StaleGradients) and self.overlaps(other)

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        return moment.earlier(self.lag)


@dataclass(frozen=True)
class GradientStale(OperationFault):
    """Update t takes the gradient of update t - lag, at the steps of a window.

    What breaks: a buffer that is read before the backward pass has filled it, or an asynchronous worker. No public
    report is known.
    Equation: g_t <- g_(t - lag), before the norm and the clip, where g_(t - lag) is what the backward pass of that
    update computed, before any fault at this point. It does not model a gradient that is stale on one replica alone.

    lag: updates, 0 for the healthy control; the first faulty update must be at least so late. group: of
    ``models.transformer.PARAMETER_GROUPS``, or None for all. Raises ValueError on impossible values, by name.
    """

    lag: int
    group: str | None = None

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ValueError(f"fault.lag={self.lag} is not allowed: 0 (the healthy control) or more updates")
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("gradients", (StaleGradients(self.group, self.lag),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "gradients", "group": self.group}, {"lag": self.lag}
        return InjectionCard(self.family, (self.injection("stale", where, size, control=self.lag == 0),))
