"""Adam's moments frozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.adam_state import MOMENTS, FrozenMoments
from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.of_group import GroupFault


@dataclass(frozen=True)
class AdamStateStale(GroupFault):
    """What Adam writes to its moments is lost at the steps of a window.

    What breaks: optimizer state that is kept elsewhere, in host memory, and not written back. No report is known.
    Equation: the update reads m <- beta1 m_0 + (1 - beta1) g and v likewise, from the moments m_0, v_0 before it, and
    afterwards they are m_0 and v_0 again. The step counter advances. From the run's first update on they stay 0.

    group: of ``models.transformer.PARAMETER_GROUPS``, or None for all. Raises ValueError for another group.
    """

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (FrozenMoments(self.group),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "optimizer", "group": self.group, "tensors": MOMENTS}
        return InjectionCard(self.family, (self.injection("freeze", where, {}),))
