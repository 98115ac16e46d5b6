"""Parameters that are updated twice a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from foreshock.faults.adam_state import AfterUpdate
from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.of_group import GroupFault, OfGroup
from foreshock.faults.optimizer_update import Update


@dataclass(frozen=True)
class SecondUpdate(OfGroup):
    """A second update of a group with the same gradient, moments and counters included."""

    stackable: ClassVar[bool] = False

    def meets(self, other: Any) -> bool:
        # the second update would read what the other leaves of the state, or not, by the order of the two
        return isinstance(other, AfterUpdate) and not other.idle and self.overlaps(other)

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        yield
        twice = set(self.touches(update.parameters))
        gradients = {name: weight.grad for name, weight in update.parameters.items()}
        before = {name: update.parameters[name].detach().clone() for name in twice}
        for name, weight in update.parameters.items():
            weight.grad = gradients[name] if name in twice else None
        update.optimizer.step()
        for name, weight in update.parameters.items():
            weight.grad = gradients[name]
            if update.log is not None and name in twice:
                update.log.add("optimizer", self, name, before[name], weight.detach())


@dataclass(frozen=True)
class DoubleUpdate(GroupFault):
    """The optimizer updates some parameters twice with one gradient, at the steps of a window.

    What breaks: a parameter that an optimizer lists twice, as a tied one under both of its names. No public report is
    known.
    Equation: after m, v, t, w <- AdamW(m, v, t, w, g) the same once more for the group, decay included; so t advances
    by 2. All parameters of the group are hit, in the real system often the tied matrix alone.

    group: of ``models.transformer.PARAMETER_GROUPS``, or None for all. Raises ValueError for another group.
    """

    group: str | None = "embedding"

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (SecondUpdate(self.group),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "optimizer", "group": self.group}
        return InjectionCard(self.family, (self.injection("repeat", where, {"updates": 2}),))
