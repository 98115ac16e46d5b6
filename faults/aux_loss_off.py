"""Load balancing switched off: the router's auxiliary loss, and the balancing bias where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from faults.base import Sites, Window


@dataclass(frozen=True)
class AuxLossOff:
    """The load-balance loss's coefficient becomes 0, and a balancing bias stands still, at the steps of a window.

    Source: arXiv:2606.28116 (auxiliary loss 1e-4 -> 0). The z-loss stays. onset: first faulty update;
    duration: updates, or None for no end. Raises ValueError on impossible values, by name.
    """

    onset: int = 0
    duration: int | None = None

    def __post_init__(self) -> None:
        self.window  # noqa: B018  (building it checks its fields)

    @cached_property
    def window(self) -> Window:
        return Window(self.onset, self.duration)

    def sites(self, step: int, healthy: Sites) -> Sites:
        return replace(healthy, balance_scale=0.0) if step in self.window else healthy
