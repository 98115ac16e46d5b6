"""A router that stops learning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard


@dataclass(frozen=True)
class RouterFrozen(WindowedFault):
    """The routers' learning rate times a factor, by default 0, at the steps of a window.

    What breaks: routers that no parameter group has, or that were frozen for a stage of training and stay so. No
    public report is named. Equation: the update of AdamW with learning rate factor x lr(step); with 0 the weights,
    which weight decay would shrink by lr x wd, keep their bits. Moments go on, as does a balancing bias, which is no
    weight. The gradients of routers stay in the global norm that the clip takes. A router that is frozen in
    some layers alone is not modelled.

    factor: 0 to 1; 1 is the healthy control. Raises ValueError on impossible values, by name.
    """

    factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor <= 1:
            raise ValueError(f"fault.factor={self.factor} is not allowed: 0 (frozen) to 1 (the healthy control)")

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        return replace(healthy, lr_scale=healthy.lr_scale.times(self.factor, ("router",)))

    def describe(self) -> InjectionCard:
        where, size = {"point": "lr_scale", "groups": ("router",)}, {"factor": self.factor}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
