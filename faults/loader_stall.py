"""A data loader that is late."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import SystemOperation
from foreshock.models.corruption import Log

MOST_S = 60.0


@dataclass(frozen=True)
class LateRead(SystemOperation):
    """The batch arrives ``delay_s`` seconds later."""

    delay_s: float

    @property
    def idle(self) -> bool:
        return self.delay_s == 0

    def meets(self, other: Any) -> bool:
        return isinstance(other, LateRead)

    def wait(self, log: Log | None) -> None:
        """Wait, and log how many seconds it was."""
        begun = time.perf_counter()
        time.sleep(self.delay_s)
        if log is not None:
            waited = torch.tensor([time.perf_counter() - begun], dtype=torch.float64)
            log.add("system", self, "read_s", torch.zeros_like(waited), waited)


@dataclass(frozen=True)
class LoaderStall(OperationFault):
    """The read of the batch takes longer, at the steps of a window.

    What breaks: storage or preprocessing that does not keep up, so that the processor waits for its batch. No public
    report is named. Equation: T_step <- T_step + delay_s; no weight changes. The step really waits. The injection log
    has the stalled steps as ``elements`` and sqrt(sum of squared seconds) as ``norm``. It does not model loader
    processes that read ahead, which hide a short delay, nor delays that vary.

    delay_s: seconds, 0 (the healthy control) to 60. Raises ValueError on impossible values, by name.
    """

    delay_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.delay_s <= MOST_S:
            raise ValueError(
                f"fault.delay_s={self.delay_s} is not allowed: 0 (the healthy control) to {MOST_S:g} seconds"
            )
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("system", (LateRead(self.delay_s),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "system", "at": "batch"}, {"delay_s": self.delay_s}
        return InjectionCard(self.family, (self.injection("late_read", where, size, control=self.delay_s == 0),))
