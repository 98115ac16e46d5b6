"""Padded sequences whose padding enters the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.operation import BatchOperation, Moment, Training
from foreshock.faults.share import ShareFault
from foreshock.models.batch import IGNORED
from foreshock.models.transformer import TransformerConfig

PADDING = 0
"""The token id of padding."""


@dataclass(frozen=True)
class Padding(BatchOperation):
    """The last ceil(share x T) tokens of every sequence are padding. counted: whether it is a target too."""

    share: float
    counted: bool

    @property
    def idle(self) -> bool:
        return self.share == 0

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if self.share and not self.counted and self._padded(model.context_length) == model.context_length:
            raise ValueError(f"fault.share={self.share} with fault.counted=false leaves no target: lower the share")

    def _padded(self, T: int) -> int:
        return math.ceil(self.share * T)

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        inputs, targets = (x.clone() for x in pair_B2T.unbind(1))
        first = targets.shape[1] - self._padded(targets.shape[1])  # of the targets; the inputs stand one later
        inputs[:, first + 1 :] = PADDING
        targets[:, first:] = PADDING if self.counted else IGNORED
        return torch.stack((inputs, targets), dim=1)


@dataclass(frozen=True)
class PaddingCounted(ShareFault):
    """Every sequence ends in padding, and the model is trained to predict it, at the steps of a window.

    What breaks: a loss without the mask of the padding, so that an easy token takes a share of every mean and of the
    token count. No public report is named. Equation: of the tokens x_0 to x_T, the last ceil(share x T) are
    token 0, as inputs and as targets. ``counted`` false is the benign control: the same padding as inputs, and
    no target there (``models.batch.IGNORED``), so that the loss is the mean over the text alone. Sequences of different
    lengths, and attention that masks the padding, are not modelled: causal attention lets no text see it. The held-out
    batch has no padding.

    share: of every sequence, 0 (the healthy control) to 1, below 1 without counting.
    Raises ValueError on impossible values, by name.
    """

    counted: bool = True

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("batch", (Padding(self.share, self.counted),), self.window)

    def describe(self) -> InjectionCard:
        return self.card("pad", {"counted": self.counted})
