"""A data loader that begins again: old batches return."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard

MOST_BATCHES = 10_000_000


@dataclass(frozen=True)
class DataRepeat(WindowedFault):
    """The batches of earlier steps are read again, at the steps of a window.

    What breaks: a resumed loader that does not skip what was read, so that the epoch begins again, or a loader that
    hands out one batch for ever. Report: huggingface/accelerate #2016.
    Equation: step s reads the batch of step (onset - back) + (s - onset) mod cycle, with the onset for ``back`` None
    (the run's first batch) and without the modulus for ``cycle`` None. Operations on the batch act at the steps of
    their own windows, and draw as at the step that is read. A loader of several workers that repeats one worker's share
    is not modelled.

    back: steps, at most the onset; 0 is the healthy control, and goes with no cycle; cycle: batches that come again and
    again, at least 1. Raises ValueError on impossible values, by name.
    """

    back: int | None = None
    cycle: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.back is not None and not 0 <= self.back <= self.onset:
            raise ValueError(f"fault.back={self.back} is not allowed: 0 to fault.onset={self.onset}, or null for all")
        if self.cycle is not None and not 1 <= self.cycle <= MOST_BATCHES:
            raise ValueError(
                f"fault.cycle={self.cycle} is not allowed: 1 to {MOST_BATCHES} batches, or null for no end"
            )
        if self.cycle is not None and self.back == 0:
            raise ValueError(f"fault.cycle={self.cycle} with fault.back=0 is no control: set fault.cycle=null")
        if self.onset == 0 and self.back is None and self.cycle is None:
            raise ValueError(
                "fault.onset=0 is not allowed: the data begin there anyway; at least 1, or set fault.cycle"
            )

    @property
    def first(self) -> int:
        """The step whose batch is read at the onset."""
        return 0 if self.back is None else self.onset - self.back

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window or self.back == 0:
            return healthy
        since = step - self.onset
        data_step = self.first + (since if self.cycle is None else since % self.cycle)
        if healthy.data_step is not None:
            raise ValueError(f"fault: at step {step} two faults say which step's batch is read")
        return healthy if data_step == step else replace(healthy, data_step=data_step)

    def describe(self) -> InjectionCard:
        size = {"back": self.onset - self.first, "cycle": self.cycle}
        control = self.first == self.onset and self.cycle is None
        return InjectionCard(self.family, (self.injection("repeat", {"point": "data_step"}, size, control=control),))
