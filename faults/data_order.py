"""Another order of the same data: a benign control."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.redrawn import Redrawn


@dataclass(frozen=True)
class DataOrder(OperationFault):
    """The same corpus in another order, at the steps of a window: nothing breaks.

    What it is a control of: a run that goes on with another shuffle seed, which a monitor must not take for a fault of
    data. Equation: every start of a sequence is drawn again, uniform over the places where one can begin, as it is in
    health, from seed, step and draw. The held-out batch stays as it is. A pass over the corpus in which each sequence
    comes once is not modelled: in health, too, sequences are drawn with replacement.

    draw: which of the other orders, from 1; 0 is the run's own. Raises ValueError on impossible values, by name.
    """

    draw: int = 1

    def __post_init__(self) -> None:
        if self.draw < 0:
            raise ValueError(f"fault.draw={self.draw} is not allowed: 0 (the run's own order) or more")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("sampling", (Redrawn(f"data_order {self.draw}" if self.draw else None),), self.window)

    def describe(self) -> InjectionCard:
        injection = self.injection("redraw", {"point": "sampling"}, {"draw": self.draw}, control=self.draw == 0)
        return InjectionCard(self.family, (injection,))
