"""The learning-rate schedule as a value: where it stands, and how much of its warm-up it has."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.faults.operation import SiteValue, Training
from foreshock.models.transformer import TransformerConfig


@dataclass(frozen=True)
class Schedule(SiteValue):
    """The schedule that one update reads; the default is the run's own.

    first_step: the update with which the schedule began; warmup_share: of the run's warm-up steps, rounded to whole
    ones, 0 to 1.
    """

    first_step: int = 0
    warmup_share: float = 1.0

    def warmup_of(self, warmup_steps: int) -> int:
        """The warm-up steps that are left of the run's own."""
        return round(self.warmup_share * warmup_steps)

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        warmup = self.warmup_of(train.warmup_steps)
        if self.warmup_share != 1 and warmup == train.warmup_steps:
            raise ValueError(
                f"fault.share={self.warmup_share} changes nothing: it leaves {warmup} of "
                f"train.warmup_steps={train.warmup_steps}"
            )
        if self.first_step and train.schedule == "constant" and warmup == 0:
            raise ValueError(
                "fault: a schedule that begins again changes nothing with train.schedule='constant' and "
                "train.warmup_steps=0"
            )
