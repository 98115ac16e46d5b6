"""Load balancing switched off: the router's auxiliary loss, and the balancing bias where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard


@dataclass(frozen=True)
class AuxLossOff(WindowedFault):
    """The load-balance loss's coefficient becomes 0, and a balancing bias stands still, at the steps of a window.

    Source: arXiv:2606.28116 (auxiliary loss 1e-4 -> 0). The z-loss stays.
    """

    def sites(self, step: int, healthy: Sites) -> Sites:
        return replace(healthy, balance_scale=0.0) if step in self.window else healthy

    def describe(self) -> InjectionCard:
        return InjectionCard(self.family, (self.injection("scale", {"point": "balance_scale"}, {"factor": 0.0}),))
