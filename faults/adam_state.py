"""What may become of Adam's state: moments and step counters that are lost, kept too long or stored too coarsely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foreshock.faults.flipped_bits import FlippedBits
from foreshock.faults.of_group import OfGroup
from foreshock.faults.optimizer_update import Update
from foreshock.faults.rounding import nearest

MOMENTS = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of Adam's first and second moment."""


@dataclass(frozen=True)
class AfterUpdate(OfGroup):
    """What becomes of the state that an update leaves behind. Two that write one tensor are refused together."""

    stackable: ClassVar[bool] = False

    @property
    def written(self) -> tuple[str, ...]:
        """The keys of the state that it writes."""
        return MOMENTS

    def meets(self, other: Any) -> bool:
        if not isinstance(other, AfterUpdate) or self.idle or other.idle:
            return False
        return self.overlaps(other) and bool(set(self.written) & set(other.written))


@dataclass(frozen=True)
class StuckCounters(AfterUpdate):
    """t stays as it is: the update's increment of the step counter is lost."""

    @property
    def written(self) -> tuple[str, ...]:
        return ("step",)

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        yield
        for name, state in update.states(self.touches(update.parameters)):
            update.write(self, name, "step", state["step"] - 1)


@dataclass(frozen=True)
class LostMoments(OfGroup):
    """m <- 0 and v <- 0 before the update; with ``counters``, t <- 0 too."""

    stackable: ClassVar[bool] = False

    counters: bool

    def meets(self, other: Any) -> bool:
        # a bit flipped before is lost, one flipped after is of a zero
        return isinstance(other, FlippedMoment) and not other.idle and bool(self.touches([other.parameter]))

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        for name, state in update.states(self.touches(update.parameters)):
            for key in (*MOMENTS, "step") if self.counters else MOMENTS:
                update.write(self, name, key, torch.zeros_like(state[key]))
        yield


@dataclass(frozen=True)
class FrozenMoments(AfterUpdate):
    """What the update writes to m and v is lost: they are as before it."""

    def meets(self, other: Any) -> bool:
        # they would be as before the other, or as after it, by the order of the two
        if isinstance(other, FlippedMoment):
            return not other.idle and bool(self.touches([other.parameter]))
        return super().meets(other) or (isinstance(other, LostMoments) and self.overlaps(other))

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        names = self.touches(update.parameters)
        # before an optimizer's first update its moments are 0
        before = {name: {key: state[key].clone() for key in MOMENTS} for name, state in update.states(names)}
        yield
        for name, state in update.states(names):
            for key in MOMENTS:
                update.write(self, name, key, before[name][key] if name in before else torch.zeros_like(state[key]))


@dataclass(frozen=True)
class RoundedMoments(AfterUpdate):
    """m and v rounded to a format after the update. moment: one of ``MOMENTS``, None for both."""

    form: str
    moment: str | None

    @property
    def idle(self) -> bool:
        return self.form == "fp32"

    @property
    def written(self) -> tuple[str, ...]:
        return MOMENTS if self.moment is None else (self.moment,)

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        yield
        for name, state in update.states(self.touches(update.parameters)):
            for key in self.written:
                update.write(self, name, key, nearest(state[key], self.form))


@dataclass(frozen=True)
class FlippedMoment(FlippedBits):
    """One bit of neighbouring elements of a moment, before the update; ``what`` is one of ``MOMENTS``."""

    stackable: ClassVar[bool] = False

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        for name, state in update.states(self.touches(update.parameters)):
            update.write(self, name, self.what, self.apply(state[self.what], update.moment))
        yield


def check_moment(moment: str | None) -> None:
    """Raise ValueError for what is no moment of Adam."""
    if moment not in (*MOMENTS, None):
        raise ValueError(f"fault.moment={moment!r} is not allowed: one of {', '.join(MOMENTS)}, or null for both")
