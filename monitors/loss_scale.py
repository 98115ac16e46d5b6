"""The loss scale of mixed-precision training, and how often gradients overflow under it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from foreshock.models.taps import known
from foreshock.monitors.base import Needs, Reading, Signal, StepView

FAMILY = "optimization"


class LossScale:
    """``loss_scale``: a GradScaler's scale after the update. Bad: down. ``skipped_updates``: how many updates it has
    skipped so far, since their gradients overflowed. Bad: up. ``overflow_rate``: skipped updates among the last
    ``window`` steps, in %; among all steps where there are fewer. Bad: up.

    Of our own loop a skipped update has a reading, when no other monitor has; of an attached loop it has none of its
    own, and the next reading counts it. All are finite; the rate is in [0, 100].
    """

    needs = Needs(view=("scaling",))

    def __init__(self, every_steps: int, window: int) -> None:
        if every_steps != 1:
            raise ValueError(f"monitor.loss_scale.every_steps={every_steps} is not allowed: it counts every step, 1")
        if window < 1:
            raise ValueError(f"monitor.loss_scale.window={window} is not allowed: at least 1 step")
        self.window = window
        self._past: deque[tuple[int, int]] = deque([(0, 0)])  # step and skipped updates by then, oldest first
        self.signals = (
            Signal("loss_scale", "1", "down", family=FAMILY),
            Signal("skipped_updates", "count", "up", family=FAMILY),
            Signal("overflow_rate", "%", "up", family=FAMILY),
        )

    def observe(self, view: StepView) -> dict[str, Reading]:
        scaling = known(view.scaling, "the GradScaler's scale")
        self._past.append((view.step, scaling.skipped))
        opens = max(view.step - self.window, 0)
        while self._past[1][0] <= opens:
            self._past.popleft()
        last, skipped = self._past[0]  # the last reading before the window; steps from there to the next were skipped
        rate = 100 * (scaling.skipped - skipped - (opens - last)) / (view.step - opens)
        values = {"loss_scale": scaling.scale, "skipped_updates": scaling.skipped, "overflow_rate": rate}
        return {
            name: torch.tensor(value, dtype=torch.float64, device=view.loss.device) for name, value in values.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"past": list(self._past)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past = deque(state["past"])
