"""What a monitor sees, made as the training loop makes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from foreshock.experiments.training.gradients import backward
from foreshock.faults.base import Sites
from foreshock.models.anatomy import Anatomy
from foreshock.models.corruption import Corrupted, ModuleFault
from foreshock.models.numerics import HEALTHY, AttentionNumerics
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import StepView


def view_of_gradients(
    model: Transformer,
    batch: Tensor | Sequence[Tensor],
    places: Collection[str],
    faults: Collection[ModuleFault] = (),
    numerics: AttentionNumerics = HEALTHY,
    loss_scale: float | None = None,
) -> StepView:
    """A view of one backward pass, before any update. batch: tokens (B, T + 1), or micro-batches of them; loss_scale: a
    factor on the loss that is backpropagated, None for 1.
    """
    parts = [batch] if isinstance(batch, Tensor) else batch
    sites = Sites(batch_size=sum(map(len, parts)), numerics=numerics)
    model.zero_grad(set_to_none=True)
    with Corrupted(model, faults):
        done = backward(model, parts, sites, places, model, scaled=lambda loss: loss * (loss_scale or 1))
    return StepView(
        step=1,
        tokens=sum(part[:, 1:].numel() for part in parts),
        loss=done.loss,
        grad_norm=torch.ones(()),
        anatomy=Anatomy.of(model),
        routings=done.routings,
        taps=done.taps,
        batch=done.watched,
        loss_scale=loss_scale,
    )
