"""A dead expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.expert_operations import DeadExpert


@dataclass(frozen=True)
class ExpertDead(OperationFault):
    """An expert's output is zero, or the gradient of its weights is dropped, at the steps of a window.

    What breaks: a buffer that the expert's kernel or the exchange between workers does not fill, or an expert whose
    gradient is not reduced. No public report is named. Equation: kind ``output``: expert_e(x) = 0 for the tokens that
    visit it, whose gates stay, so that they lose this expert's share; the backward is that of the expert as it is, as
    its kernel does not know. kind ``gradient``: dW_e = 0 for the expert's two or three matrices before the
    accumulation; Adam's momentum and weight decay go on. An expert that no token visits, for the router avoids it, is
    not modelled. The laws of linear layers see both, for output and gradient no longer fit input and weight.

    layer, expert: indices from 0; expert None is the healthy control. Raises ValueError on impossible values, by name.
    """

    layer: int
    expert: int | None
    kind: str = "output"

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("modules", (DeadExpert(self.layer, self.expert, self.kind),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "modules", "modules": (f"blocks.{self.layer}.mlp",), "tensor": self.kind}
        injection = self.injection("dead_expert", where, {"expert": self.expert}, control=self.expert is None)
        return InjectionCard(self.family, (injection,))
