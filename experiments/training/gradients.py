"""The gradient of one update, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreshock.faults.base import Sites
from foreshock.models.moe import Routing
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer


class Backward(NamedTuple):
    """What a backward pass leaves beside the parameters' ``grad``, the mean over the batch.

    loss: mean NLL of the batch, 0-dim, detached; watched: the micro-batch that taps and routings are of, the last.
    """

    loss: Tensor
    routings: tuple[Routing, ...]
    taps: Taps
    watched: Tensor


def micro_batches(batch: Tensor, micro_batch: int | None, watched_sequences: int | None) -> tuple[Tensor, ...]:
    """A batch (B, T + 1) in the pieces that go through the model one after the other, the watched one last.

    micro_batch: sequences a piece, the last the rest; None for the whole batch. watched_sequences: so many of the last
    piece are then one of their own; None, or as many as it has, for all of it.
    """
    parts: tuple[Tensor, ...] = torch.split(batch, micro_batch or len(batch))
    *others, last = parts
    unwatched = len(last) - (watched_sequences or len(last))
    return (*others, last) if unwatched <= 0 else (*others, last[:unwatched], last[unwatched:])


def backward(
    model: Transformer,
    parts: Sequence[Tensor],
    sites: Sites,
    places: Collection[str],
    unwatched: Callable[..., Any],
    after_part: Callable[[], None] | None = None,
    in_part: Callable[[int], AbstractContextManager[None]] = lambda part: nullcontext(),
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Backward:
    """Backpropagate the objective of a batch, in ``micro_batches`` of tokens, through a model without gradients.

    places: what is tapped in the last part; unwatched: the objective for all others; after_part: called after each
    addition to the sum of gradients; in_part: the context of a part's two passes, by its index; scaled: what is
    backpropagated in place of a loss, so many times it, as are then all gradients. The last is backpropagated as a
    batch of its own, the others by their size relative to it, and the sum of gradients is divided afterwards, so that
    every law of a gradient holds in what the taps saw. A router's auxiliary losses and its capacity are of a
    micro-batch, as wherever gradients are accumulated.
    """
    *others, last = parts
    losses = []
    for index, part in enumerate(others):
        weight = len(part) / len(last)
        with in_part(index):
            loss, auxiliary, _ = unwatched(part, sites.numerics, sites.balance_scale)
            scaled(weight * (loss + auxiliary)).backward()
        losses.append(weight * loss.detach())
        if after_part is not None:
            after_part()
    with in_part(len(others)), Taps(model, places) as taps:
        loss, auxiliary, routings = model(last, sites.numerics, sites.balance_scale)
        scaled(loss + auxiliary).backward()
    if after_part is not None:
        after_part()
    if not others:
        return Backward(loss.detach(), routings, taps, last)
    of_the_last = sum(map(len, parts)) / len(last)
    gradients: list[Any] = [parameter.grad for parameter in model.parameters()]
    torch._foreach_div_(gradients, of_the_last)
    return Backward(torch.stack([*losses, loss.detach()]).sum() / of_the_last, routings, taps, last)
