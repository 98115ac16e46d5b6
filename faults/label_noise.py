"""Label noise: a share of the targets is random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.operation import BatchOperation, Moment
from foreshock.faults.share import ShareFault


@dataclass(frozen=True)
class RandomTargets(BatchOperation):
    """Replace ceil(share x targets) of a batch's targets by other tokens, drawn from seed and step."""

    changes: ClassVar[tuple[str, ...]] = ("targets",)

    share: float

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        inputs, targets = pair_B2T.unbind(1)
        generator, count = moment.generator("label_noise"), targets.numel()
        places = generator.permutation(count)[: math.ceil(self.share * count)]
        shift = torch.zeros(count, dtype=torch.int64)
        shift[torch.from_numpy(places)] = torch.from_numpy(generator.integers(1, moment.vocab_size, size=len(places)))
        noisy = (targets + shift.view(targets.shape).to(targets.device)) % moment.vocab_size
        return torch.stack((inputs, noisy), dim=1)


@dataclass(frozen=True)
class LabelNoise(ShareFault):
    """A share of the targets is another token than the right one, at the steps of a window.

    What breaks: corrupt shards or wrong labels, so that the next token does not follow. No public report is known.
    Equation: at ceil(share x B T) positions of the batch, drawn without replacement, y <- (y + u) mod V with u uniform
    on 1 to V - 1, so that each of them is uniform over all wrong tokens (the random labels of arXiv:1611.03530, without
    the right one). The draw is a pure function of seed and step. Inputs and the held-out batch stay right; a corrupt
    corpus, where a wrong token is an input too, is not modelled.

    share: 0 (the healthy control) to 1. Raises ValueError on impossible values, by name.
    """

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("batch", (RandomTargets(self.share),), self.window)

    def describe(self) -> InjectionCard:
        return self.card("random_tokens")
