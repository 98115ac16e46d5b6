"""Label noise: a share of the targets is random."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Moment, Operation


@dataclass(frozen=True)
class RandomTargets(Operation):
    """Replace ceil(share x targets) of a batch's targets by other tokens, drawn from seed and step."""

    stackable: ClassVar[bool] = False

    share: float

    @property
    def idle(self) -> bool:
        return self.share == 0

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name == "targets"]

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        generator = moment.generator("label_noise")
        places = generator.permutation(x.numel())[: math.ceil(self.share * x.numel())]
        shift = torch.zeros(x.numel(), dtype=torch.int64)
        shift[torch.from_numpy(places)] = torch.from_numpy(generator.integers(1, moment.vocab_size, size=len(places)))
        return (x + shift.view(x.shape).to(x.device)) % moment.vocab_size


@dataclass(frozen=True)
class LabelNoise(OperationFault):
    """A share of the targets is another token than the right one, at the steps of a window.

    What breaks: corrupt shards or wrong labels, so that the next token does not follow. No public report is known.
    Equation: at ceil(share x B T) positions of the batch, drawn without replacement, y <- (y + u) mod V with u uniform
    on 1 to V - 1, so that each of them is uniform over all wrong tokens (the random labels of arXiv:1611.03530, without
    the right one). The draw is a pure function of seed and step. Inputs and the held-out batch stay right; a corrupt
    corpus, where a wrong token is an input too, is not modelled.

    share: 0 (the healthy control) to 1. Raises ValueError on impossible values, by name.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"fault.share={self.share} is not allowed: 0 (the healthy control) to 1")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("batch", (RandomTargets(self.share),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "batch", "tensors": ("targets",)}, {"share": self.share}
        return InjectionCard(self.family, (self.injection("random_tokens", where, size, control=self.share == 0),))
