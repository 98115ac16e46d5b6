"""Dropout whose masks are a pure function of the run's seed, the step, the micro-batch and the place.

Srivastava et al. 2014, at GPT-2's places outside of attention's own kernel: behind the embeddings, the output
projection of attention, and the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from foreshock.models.numerics import at_least_fp32


@dataclass(frozen=True)
class Draw:
    """Which masks a forward draws. seed: of the run; step: from 0; part: of the micro-batches; again: others instead.

    Masks have the same bits on one kind of device. What a CPU draws, a GPU does not.
    """

    seed: int
    step: int
    part: int
    again: bool = False

    def generator(self, place: int, device: torch.device) -> torch.Generator:
        """Of the masks at one place of the model; no two draws or places share theirs."""
        words = np.random.SeedSequence((self.seed, self.step, self.part, int(self.again), place))
        # a generator takes 63 bits
        return torch.Generator(device).manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))


class Dropout(nn.Module):
    """y = x m / (1 - rate) where m is 1 with probability 1 - rate, else 0; y = x where nothing is drawn.

    rate: 0 to below 1; place: a number of its own in the model; draw: which masks, None outside of training
    (``dropping``). x: any shape and device; y is FP32 at least, as the residual stream is.
    """

    def __init__(self, rate: float, place: int) -> None:
        super().__init__()
        self.rate, self.place = rate, place
        self.draw: Draw | None = None

    def kept(self, x: Tensor, draw: Draw) -> Tensor:
        """The mask, bool, of x's shape."""
        uniform = torch.rand(x.shape, generator=draw.generator(self.place, x.device), device=x.device)
        return uniform >= self.rate

    def forward(self, x: Tensor) -> Tensor:
        if self.draw is None:
            return x
        return torch.where(self.kept(x, self.draw), at_least_fp32(x) / (1 - self.rate), 0.0)


def dropout_at(rate: float, place: int) -> Dropout | None:
    """None for a rate of 0, which costs nothing."""
    return Dropout(rate, place) if rate else None


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x behind a place of the model."""
    return x if dropout is None else dropout(x)


@contextmanager
def dropping(model: nn.Module, draw: Draw) -> Iterator[None]:
    """While it is open, the model's forwards draw these masks; its backward belongs inside where it computes again."""
    places = [module for module in model.modules() if isinstance(module, Dropout)]
    before = [place.draw for place in places]
    for place in places:
        place.draw = draw
    try:
        yield
    finally:
        for place, own in zip(places, before, strict=True):
            place.draw = own
