"""Gaussian noise on gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Moment


@dataclass(frozen=True)
class NoisyGradients(OfGroup):
    """g <- g + share ||g|| z / sqrt(n) for every tensor of a group, z standard normal, n the tensor's elements."""

    share: float

    @property
    def idle(self) -> bool:
        return self.share == 0

    def meets(self, other: Any) -> bool:
        return isinstance(other, NoisyGradients) and self.overlaps(other)  # they would share their draws

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        draws = moment.generator(f"gradient_noise {moment.tensor}").standard_normal(x.numel(), dtype=np.float32)
        noise = torch.from_numpy(draws).view(x.shape).to(x.device)
        return x + noise * (self.share * torch.linalg.vector_norm(x) / math.sqrt(x.numel()))


@dataclass(frozen=True)
class GradientNoise(OperationFault):
    """Gaussian noise of a share of each gradient tensor's norm, at the steps of a window.

    What breaks: a noisy reduction, or too small a batch. No public report is known.
    Equation: g <- g + share ||g|| z / sqrt(n) for each tensor of n elements, z standard normal, before the norm and
    the clip; the expected square of the noise's norm is (share ||g||)^2. The draw is a pure function of seed, step and
    tensor. It does not model noise that is correlated between tensors or steps.

    share: 0 (the healthy control) or more, finite; group: of ``models.transformer.PARAMETER_GROUPS``, or None for all.
    Raises ValueError on impossible values, by name.
    """

    share: float
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share < math.inf:
            raise ValueError(f"fault.share={self.share} is not allowed: 0 (the healthy control) or more, finite")
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("gradients", (NoisyGradients(self.group, self.share),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "gradients", "group": self.group}, {"share": self.share}
        return InjectionCard(self.family, (self.injection("noise", where, size, control=self.share == 0),))
