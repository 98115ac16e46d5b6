"""Load balancing that counts too much or too little: the router's auxiliary loss, and the balancing bias's step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard


@dataclass(frozen=True)
class AuxLossScale(WindowedFault):
    """The load-balance loss's coefficient, and the step of a balancing bias, times a factor, at the steps of a window.

    What breaks: an auxiliary loss that is divided by the number of micro-batches or by that of all workers once too
    often (below 1), or added once for each micro-batch (above 1). Report: NVIDIA-NeMo/Automodel #3359.
    Equation: loss = NLL + factor aux_coef L_balance + z_coef L_z, and b_e += factor speed sign(mean load - load_e).
    The z-loss stays. A factor that differs between layers is not modelled.

    factor: 0 or more; 1 is the healthy control. Raises ValueError on impossible values, by name.
    """

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: 0 or more; 1 is the healthy control")

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        return replace(healthy, balance_scale=healthy.balance_scale * self.factor)

    def describe(self) -> InjectionCard:
        size, control = {"factor": self.factor}, self.factor == 1
        return InjectionCard(self.family, (self.injection("scale", {"point": "balance_scale"}, size, control=control),))
