"""Learning-rate scaling, at once or as a ramp: the hyperparameter fault of arXiv:2606.28116."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard
from foreshock.models.transformer import PARAMETER_GROUPS


@dataclass(frozen=True)
class LRScale(WindowedFault):
    """Multiply the scheduled learning rate by ``factor`` at the steps of a window.

    With ``ramp_steps`` = R the factor grows exponentially from the onset: factor^min(1, (step - onset + 1) / R),
    so the R-th faulty update is the first with the whole of it. Source: the authors' design notes
    (uniform x10 and x40); the ramp is ours, for a fault with a lead time to measure.

    factor: above 0; below 1 it lowers the rate; groups: names in ``models.transformer.PARAMETER_GROUPS``, or
    None for every parameter. Raises ValueError on impossible values, by name.
    """

    factor: float
    ramp_steps: int = 0
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: above 0")
        super().__post_init__()
        if self.ramp_steps < 0:
            raise ValueError(f"fault.ramp_steps={self.ramp_steps} is not allowed: 0 or more")
        if self.duration is not None and self.ramp_steps > self.duration:
            raise ValueError(
                f"fault.ramp_steps={self.ramp_steps} is longer than fault.duration={self.duration}: "
                "the ramp would never reach its factor"
            )
        if self.groups is not None:
            unknown = [group for group in self.groups if group not in PARAMETER_GROUPS]
            if unknown or not self.groups or len(set(self.groups)) != len(self.groups):
                raise ValueError(
                    f"fault.groups={list(self.groups)} is not allowed: "
                    f"distinct names of {', '.join(PARAMETER_GROUPS)}, or null for all"
                )

    def factor_at(self, step: int) -> float:
        """The factor of a step inside the window."""
        if not self.ramp_steps:
            return self.factor
        return self.factor ** min(1.0, (step - self.onset + 1) / self.ramp_steps)

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        groups = PARAMETER_GROUPS if self.groups is None else self.groups
        return replace(healthy, lr_scale=healthy.lr_scale.times(self.factor_at(step), groups))

    def describe(self) -> InjectionCard:
        where = {"point": "lr_scale", "groups": self.groups}
        size = {"factor": self.factor, "ramp_steps": self.ramp_steps}
        return InjectionCard(self.family, (self.injection("scale", where, size, control=self.factor == 1),))
