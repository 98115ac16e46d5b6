"""Spikes of the loss and of the gradient norm against their own recent past."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.cadence import Cadence
from foreshock.monitors.signal import EXACT

SIGMAS = 7.0
"""Standard deviations from the rolling mean at which OLMo 2 calls a value a spike."""


class SpikeScore:
    """``loss_spike_score``: share, in %, of the last ``window`` losses that are spikes. Bad: up.

    A value is a spike if it stands more than 7 standard deviations from the mean of the ``window`` values before it
    (OLMo 2, arXiv:2501.00656); fewer do at the start, but at least ``minimum``, and no value is judged before that. Its
    own value is left out of that mean, so that a spike cannot hide itself. ``loss_spike_score.grad_norm``: the same of
    the gradient norm before the clip. ``grad_spike_score``: that norm over its exponential moving average,
    EMA_t = beta EMA_(t-1) + (1 - beta) x_t from EMA_1 = x_1, at every step; above 2 is a spike.

    A non-finite value is a spike, and so is each one after it while it is in their window; in the EMA it stays.
    every_steps: how often the scores are read; every value is judged all the same.
    """

    needs = Needs(stackable=True)

    def __init__(self, every_steps: int, window: int, minimum: int, beta: float) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"monitor.spike_score.beta={beta} is not allowed: between 0 and 1")
        if window < 2:
            raise ValueError(f"monitor.spike_score.window={window} is not allowed: at least 2 values")
        if not 2 <= minimum <= window:
            raise ValueError(f"monitor.spike_score.minimum={minimum} is not allowed: 2 to window={window}")
        self.window, self.minimum, self.beta = window, minimum, beta
        self._cadence = Cadence(every_steps, self.needs.jittered)
        self._average: Tensor | None = None
        self._waiting: list[Tensor] = []  # values since the last reading, each (2,)
        self._values: Tensor | None = None  # (2, up to window), those before
        self._spikes: Tensor | None = None  # (2, up to window), the verdicts
        self.signals = (
            Signal("grad_spike_score", "1", "up", family="optimization", above=2.0),
            *(
                Signal(name, "%", "up", every_steps=every_steps, family="optimization", kind=EXACT)
                for name in ("loss_spike_score", "loss_spike_score.grad_norm")
            ),
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        norm = view.grad_norm.detach()
        self._average = norm.clone() if self._average is None else self._average.lerp(norm, 1 - self.beta)
        readings: dict[str, Reading] = {"grad_spike_score": norm / self._average}
        self._waiting.append(torch.stack((view.loss.detach(), norm)))
        if self._cadence.is_due(view.step):
            self._judge()
            if self._spikes is not None:
                scores = 100 * self._spikes.float().mean(1)
                readings |= {"loss_spike_score": scores[0], "loss_spike_score.grad_norm": scores[1]}
        return readings

    def _judge(self) -> None:
        """Give every waiting value its verdict, then forget what no later verdict needs."""
        new = torch.stack(self._waiting, 1)
        values = new if self._values is None else torch.cat((self._values, new), 1)
        count = values.shape[1]
        judged = range(max(count - len(self._waiting), self.minimum), count)
        if judged:
            pasts = [torch.std_mean(values[:, max(0, i - self.window) : i], dim=1, correction=0) for i in judged]
            deviation, mean = (torch.stack(part, 1) for part in zip(*pasts, strict=True))
            resolution = self.window * torch.finfo(values.dtype).eps * mean.abs()  # of the mean of equal values
            usual = SIGMAS * deviation + resolution
            spikes = ~((values[:, judged.start :] - mean).abs() <= usual)  # so that NaN is one
            self._spikes = spikes if self._spikes is None else torch.cat((self._spikes, spikes), 1)
            self._spikes = self._spikes[:, -self.window :]
        self._values, self._waiting = values[:, -self.window :], []

    def state_dict(self) -> dict[str, Any]:
        # Clones: a view would carry its whole base into the checkpoint.
        values, spikes = (None if x is None else x.clone() for x in (self._values, self._spikes))
        return {"average": self._average, "waiting": list(self._waiting), "values": values, "spikes": spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average, self._waiting = state["average"], list(state["waiting"])
        self._values, self._spikes = state["values"], state["spikes"]
