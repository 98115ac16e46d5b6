"""Readings that arrive late or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Moment, SystemOperation, Training
from foreshock.faults.share import check_share
from foreshock.models.transformer import TransformerConfig

MOST_STEPS = 10_000_000


@dataclass(frozen=True)
class Gap(SystemOperation):
    """Between monitors and recorder, each reading is lost with probability ``share``, or ``delay`` updates late."""

    delay: int
    share: float

    @property
    def idle(self) -> bool:
        return self.delay == 0 and self.share == 0

    def meets(self, other: Any) -> bool:
        return isinstance(other, Gap)

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if self.delay >= train.steps:
            raise ValueError(
                f"fault.delay={self.delay} is not allowed: below train.steps={train.steps}; fault.share=1 loses every "
                "reading"
            )

    def loses(self, signal: str, moment: Moment) -> bool:
        """Whether a signal's reading of this step is lost: a function of seed, step and signal."""
        return bool(moment.generator(f"telemetry_gap {signal}").random() < self.share)


@dataclass(frozen=True)
class TelemetryGap(OperationFault):
    """Readings of a window reach the trace late or never; monitors and weights stay as they are.

    What breaks: a collector that is overloaded or cut off. Report: arXiv:2503.20263.
    Equation: a reading taken after update s is lost with probability ``share``, drawn from seed, step and signal; else
    it arrives after update s + delay. At each step at which a signal is due, the trace has the newest reading that has
    arrived and was not there before, at the step of its arrival, so that an alarm comes later. Where none has, there is
    a missing sample: ``undefined``, with no value. A late reading that a newer one has overtaken is dropped. The label,
    the loss on the held-out batch, is no telemetry. A run that lost readings has been read, and no command trains it
    again for them. It does not model readings that come twice or with a wrong time.

    delay: updates, from 0 to below the run's length; share: 0 to 1; both 0 are the healthy control. Raises ValueError
    on impossible values, by name.
    """

    delay: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.delay <= MOST_STEPS:
            raise ValueError(f"fault.delay={self.delay} is not allowed: 0 to {MOST_STEPS} updates")
        check_share(self.share)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("system", (Gap(self.delay, self.share),), self.window)

    def describe(self) -> InjectionCard:
        gap = Gap(self.delay, self.share)
        where, size = {"point": "system", "at": "readings"}, {"delay": self.delay, "share": self.share}
        return InjectionCard(self.family, (self.injection("gap", where, size, control=gap.idle),))
