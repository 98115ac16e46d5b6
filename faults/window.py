"""When a fault acts: an onset, a duration and a period."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The steps ``onset <= step < onset + duration`` with ``(step - onset) % every == phase``.

    onset: optimizer updates from 0; duration: updates, or None for no end; every: the period of an intermittent fault
    in updates, 1 for every step; phase: the first faulty step of a period, from 0.
    Raises ValueError on impossible values, and on a window without a step, by name.
    """

    onset: int = 0
    duration: int | None = None
    every: int = 1
    phase: int = 0

    def __post_init__(self) -> None:
        if self.onset < 0:
            raise ValueError(f"fault.onset={self.onset} is not allowed: a step from 0")
        if self.duration is not None and self.duration < 1:
            raise ValueError(f"fault.duration={self.duration} is not allowed: at least 1 step, or null for no end")
        if self.every < 1:
            raise ValueError(f"fault.every={self.every} is not allowed: at least 1 step")
        last = self.every if self.duration is None else min(self.every, self.duration)
        if not 0 <= self.phase < last:
            raise ValueError(f"fault.window_phase={self.phase} is not allowed: from 0 to {last - 1}")

    @property
    def first(self) -> int:
        """The first step in it."""
        return self.onset + self.phase

    def __contains__(self, step: int) -> bool:
        since = step - self.onset
        return since >= 0 and (self.duration is None or since < self.duration) and since % self.every == self.phase
