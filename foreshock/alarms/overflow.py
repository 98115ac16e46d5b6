"""Overflow storms of a GradScaler: its scale falls again and again."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

STORM = 3
"""Overflows within one growth interval that are a storm."""


def is_enabled(scaler: Any) -> bool:
    """Whether there is a scaler that scales; ``GradScaler(enabled=False)`` does nothing."""
    return scaler is not None and (not hasattr(scaler, "is_enabled") or bool(scaler.is_enabled()))


def skips(scaler: Any, loss: Tensor, grad_norm: Tensor) -> bool:
    """Whether a GradScaler throws this step's gradients away: some are not finite. Asks the device, so it waits for it.

    loss: of the batch; where it is not finite itself, no smaller scale helps, and this is no overflow. grad_norm:
    of all gradients. False without a scaler, None, and for one that is not enabled.
    """
    return is_enabled(scaler) and bool(loss.isfinite().all()) and not bool(grad_norm.isfinite())


class Overflows:
    """Updates that a ``torch.amp.GradScaler`` skipped, told from its scale; ``scaler.update()`` comes before ``step``.

    A healthy scaler doubles its scale after ``growth_interval`` clean updates (2,000) and halves it at an overflow. So
    one overflow a growth interval is its way of finding the largest scale, and the halvings before the first clean
    update are its search at the start, which ends at a scale below 1 at the latest: gradients that overflow there would
    do so without a scaler. Three overflows within one interval after that are a storm: the scale is being driven down.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler, self._scale = scaler, float(scaler.get_scale())
        self._interval = int(scaler.get_growth_interval()) if hasattr(scaler, "get_growth_interval") else 2000
        self._steps: deque[int] = deque(maxlen=STORM)
        self._searching = True

    def update(self, step: int) -> str | None:
        """After a step: what a storm is, in words, or None. A storm is told once, until three more overflows."""
        scale = float(self._scaler.get_scale())
        fell, self._scale = scale < self._scale, scale
        if not fell:
            self._searching = False
            return None
        self._searching &= scale >= 1
        if self._searching:
            return None
        self._steps.append(step)
        if len(self._steps) < STORM or step - self._steps[0] >= self._interval:
            return None
        first = self._steps[0]
        self._steps.clear()
        return f"{STORM} overflows from step {first} to {step}, loss scale now {scale:g}"
