"""No learning-rate warm-up, or a shorter one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard
from foreshock.faults.operation import Training


@dataclass(frozen=True)
class WarmupOff(WindowedFault):
    """The schedule of a run with fewer warm-up steps, at the steps of a window.

    What breaks: a configuration without a warm-up. No public report is known.
    Equation: lr_t = the schedule with round(share x train.warmup_steps) warm-up steps, at step t; from step 0 on it is
    the very run with so many. A cosine schedule decays over the steps after the warm-up, so it is a little lower later.

    share: of the run's warm-up steps that are left, 0 to 1, the healthy control. Raises ValueError on impossible
    values, by name, and before training where the run has no warm-up.
    """

    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"fault.share={self.share} is not allowed: 0 to 1 (the healthy control)")
        super().__post_init__()

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        share = healthy.schedule.warmup_share * self.share
        return replace(healthy, schedule=replace(healthy.schedule, warmup_share=share))

    def check_begins(self, train: Training) -> None:
        if train.schedule == "constant" and self.window.first >= train.warmup_steps - 1 >= 0:
            raise ValueError(
                f"fault.onset={self.onset} is too late: the last of train.warmup_steps={train.warmup_steps} has the "
                "whole rate, and after it the schedule is constant"
            )

    def describe(self) -> InjectionCard:
        where, size = {"point": "schedule"}, {"share": self.share}
        return InjectionCard(self.family, (self.injection("shorten", where, size, control=self.share == 1),))
