"""The optimization family: loss, gradient norm and update size, the baselines that every trainer watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreshock.models.anatomy import BLOCK
from foreshock.models.taps import known
from foreshock.monitors.base import Lookback, Masked, Needs, Reading, Signal, StepView

FAMILY = "optimization"


class Loss:
    """``train_loss_raw``: the batch's mean next-token NLL, nats per token. ``train_loss_ema``: its EMA.

    EMA_t = beta EMA_(t-1) + (1 - beta) loss_t from EMA_1 = loss_1. Bad: up. NaN and Inf stay in the EMA.
    """

    needs = Needs(stackable=True)

    def __init__(self, every_steps: int, beta: float) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"monitor.loss.beta={beta} is not allowed: between 0 and 1")
        if every_steps != 1:
            raise ValueError(f"monitor.loss.every_steps={every_steps} is not allowed: an EMA takes every step, 1")
        self.beta = beta
        self._ema: Tensor | None = None
        self.signals = tuple(
            Signal(name, "nats/token", "up", family=FAMILY) for name in ("train_loss_raw", "train_loss_ema")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        loss = view.loss.detach()
        self._ema = loss.clone() if self._ema is None else self.beta * self._ema + (1 - self.beta) * loss
        return {"train_loss_raw": loss, "train_loss_ema": self._ema}

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self._ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ema = state["ema"]


class GradientNorm:
    """``grad_global_norm``: L2 norm of all gradients before the clip. Bad: up."""

    needs = Needs(stackable=True)

    def __init__(self, every_steps: int) -> None:
        self.signals = (Signal("grad_global_norm", "1", "up", every_steps=every_steps, family=FAMILY),)

    def observe(self, view: StepView) -> dict[str, Reading]:
        return {"grad_global_norm": view.grad_norm.detach()}


class UpdateToWeight:
    """``update_to_weight``: ||theta_t - theta_(t-1)|| / ||theta_(t-1)|| of each block; healthy: 1e-3; bad: both.

    A block of zeros has no relative update: masked. NaN gives NaN, Inf gives Inf or NaN.
    """

    def __init__(self, every_steps: int) -> None:
        self.signals = (
            Signal("update_to_weight", "1", "both", ("layer",), every_steps, family=FAMILY, above=1e-2, below=1e-4),
        )
        self.needs = Needs(history=(Lookback(1, every_steps, (BLOCK,)),), stackable=True)

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        before, now = known(view.weights_before(1), "the weights of a step ago"), view.anatomy.weights()
        update, weight = [], []
        for block in view.anatomy.blocks:
            old = [before[name] for name in block.parameters]
            change = torch._foreach_sub([now[name] for name in block.parameters], old)
            update.append(torch.stack(torch._foreach_norm(change)).norm())
            weight.append(torch.stack(torch._foreach_norm(old)).norm())
        size, norm = torch.stack(update), torch.stack(weight)
        return {"update_to_weight": Masked(size / norm, (norm == 0) & size.isfinite())}
