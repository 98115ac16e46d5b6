"""The gradient of one update, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faults.base import Sites
from models.moe import Routing
from models.taps import Taps
from models.transformer import Transformer


class Backward(NamedTuple):
    """What a backward pass leaves beside the parameters' ``grad``, the mean over the batch.

    loss: mean NLL of the batch, 0-dim, detached; watched: the micro-batch that taps and routings are of, the last.
    """

    loss: Tensor
    routings: tuple[Routing, ...]
    taps: Taps
    watched: Tensor


def backward(
    model: Transformer,
    batch: Tensor,
    sites: Sites,
    micro_batch: int | None,
    places: Collection[str],
    unwatched: Callable[..., Any],
) -> Backward:
    """Backpropagate the objective of a batch, tokens (B, T + 1), through a model without gradients.

    micro_batch: sequences at a time, a divisor of B; B itself or more, or None, for one piece. places: what is tapped.
    unwatched: the objective for all micro-batches but the last. Each is backpropagated as a batch of its own and the
    sum of gradients divided afterwards, so that every law of a gradient holds in what the taps saw. A router's
    auxiliary losses and its capacity are of a micro-batch, as wherever gradients are accumulated.
    """
    *others, last = batch.split(micro_batch or len(batch))
    losses = []
    for part in others:
        loss, auxiliary, _ = unwatched(part, sites.numerics, sites.balance_scale)
        (loss + auxiliary).backward()
        losses.append(loss.detach())
    with Taps(model, places) as taps:
        loss, auxiliary, routings = model.objective(last, sites.numerics, sites.balance_scale)
        (loss + auxiliary).backward()
    if not others:
        return Backward(loss.detach(), routings, taps, last)
    torch._foreach_div_([parameter.grad for parameter in model.parameters()], len(others) + 1)
    return Backward(torch.stack([*losses, loss.detach()]).mean(), routings, taps, last)
