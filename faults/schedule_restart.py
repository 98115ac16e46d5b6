"""A learning-rate schedule that begins again, or falls back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard
from foreshock.faults.operation import Training


@dataclass(frozen=True)
class ScheduleRestart(WindowedFault):
    """The schedule stands at an earlier step than the run, at the steps of a window.

    What breaks: a resume without the scheduler, or with that of an older checkpoint. Report: allenai/allennlp #1650.
    Equation: lr_t = schedule(t - min(back_steps, onset)): with None, the schedule begins again at the onset, with its
    warm-up. The run's length stays: a cosine schedule does not reach its end. The optimizer's state is kept.

    back_steps: updates by which it falls back, None for all of them, 0 for the healthy control; the first faulty update
    is not the run's first, where no schedule is lost. Raises ValueError on impossible values, by name.
    """

    back_steps: int | None = None

    def __post_init__(self) -> None:
        if self.back_steps is not None and self.back_steps < 0:
            raise ValueError(f"fault.back_steps={self.back_steps} is not allowed: 0 (the healthy control) or more")
        super().__post_init__()
        if self.onset == 0:
            raise ValueError("fault.onset=0 is not allowed: the schedule begins there anyway; at least 1")

    @property
    def _first_step(self) -> int:
        return self.onset if self.back_steps is None else min(self.back_steps, self.onset)

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        if healthy.schedule.first_step:
            raise ValueError(f"fault: at step {step} two faults say where the learning-rate schedule stands")
        return replace(healthy, schedule=replace(healthy.schedule, first_step=self._first_step))

    def check_begins(self, train: Training) -> None:
        if train.schedule == "constant" and self.window.first - self._first_step >= train.warmup_steps - 1 >= 0:
            raise ValueError(
                f"fault.back_steps={self.back_steps} is too few: from update {self.window.first} it falls back to "
                f"where the schedule is constant, from the last of train.warmup_steps={train.warmup_steps} on"
            )

    def describe(self) -> InjectionCard:
        where, size = {"point": "schedule"}, {"back_steps": self.back_steps}
        return InjectionCard(self.family, (self.injection("restart", where, size, control=self.back_steps == 0),))
