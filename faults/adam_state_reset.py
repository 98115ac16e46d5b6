"""Adam's state lost: the moments begin again at zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.adam_state import MOMENTS, LostMoments
from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import check_group


@dataclass(frozen=True)
class AdamStateReset(OperationFault):
    """Adam's moments are set to zero before the updates of a window, by default once.

    What breaks: a resume that restores the weights and not the optimizer. Report: OpenPipe/ART #72.
    Equation: m <- 0, v <- 0 and, with ``counters``, t <- 0, so that the bias correction begins again too, as in a new
    optimizer. Without it the first update is lr (1 - beta1) / sqrt(1 - beta2) g / |g|, and v is too small for some
    1 / (1 - beta2) updates. It does not model a data position or schedule that are lost with the state.

    group: of ``models.transformer.PARAMETER_GROUPS``, or None for all; the first faulty update is after the run's
    first, which has no state to lose. Raises ValueError on impossible values, by name.
    """

    counters: bool = True
    group: str | None = None

    def __post_init__(self) -> None:
        check_group(self.group)
        super().__post_init__()
        if self.window.first == 0:
            raise ValueError("fault.onset=0 is not allowed: the run's first update has no state to lose; at least 1")

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (LostMoments(self.group, self.counters),), self.window)

    def describe(self) -> InjectionCard:
        tensors = (*MOMENTS, "step") if self.counters else MOMENTS
        where = {"point": "optimizer", "group": self.group, "tensors": tensors}
        return InjectionCard(self.family, (self.injection("reset", where, {}),))
