"""The observability family: events that no healthy run has."""

from __future__ import annotations

import torch

from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.signal import EXACT


class NonFinite:
    """``nan_inf_events``: updates with a non-finite loss or gradient norm, plus non-finite values at fault sites.

    A fault site counts what reaches it *before* the fault acts, since truncation can turn NaN into
    Inf and Inf into a finite number. A non-finite weight shows in the next loss. Bad: up.
    """

    needs = Needs(stackable=True)

    def __init__(self, every_steps: int) -> None:
        if every_steps != 1:
            raise ValueError(f"monitor.non_finite.every_steps={every_steps} is not allowed: it counts every step, 1")
        self._updates: torch.Tensor | None = None
        self.signals = (Signal("nan_inf_events", "count", "up", family="observability", kind=EXACT, above=0.0),)

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        broken = ~torch.isfinite(view.loss + view.grad_norm)
        self._updates = broken.long() if self._updates is None else self._updates + broken
        return {"nan_inf_events": sum((block.attention.nonfinite for block in view.model.blocks), self._updates)}

    def state_dict(self) -> dict:
        return {"updates": self._updates}

    def load_state_dict(self, state: dict) -> None:
        self._updates = state["updates"]
