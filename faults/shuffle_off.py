"""Batches in the order of the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.operation import Moment, Places, SamplingOperation
from foreshock.faults.share import ShareFault, chosen_rows


@dataclass(frozen=True)
class InOrder(SamplingOperation):
    """ceil(share x B) sequences of a batch follow one another in the corpus, from the end of the batch before."""

    share: float

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, starts_B: np.ndarray, places: Places, moment: Moment) -> np.ndarray:
        rows = np.sort(chosen_rows("shuffle_off", self.share, len(starts_B), moment))
        sequences = moment.step * len(rows) + np.arange(len(rows))
        moved = starts_B.copy()
        moved[rows] = sequences * places.context_length % places.count
        return moved


@dataclass(frozen=True)
class ShuffleOff(ShareFault):
    """Sequences come in the order of the files, at the steps of a window.

    What breaks: a sampler that does not shuffle, so that the sequences of a batch are of one document and batches
    drift through the corpus. No public report is named. Equation: sequence i of step s begins at token (s B + i) T of
    the training part, modulo the places where one can begin, with the B of that step; it is the same for every seed.
    With a share, so many of a batch's sequences, drawn from seed and step, come in order and B is their number. A
    buffer that shuffles neighbours alone is not modelled; the held-out batch stays as it is.

    share: 0 (the healthy control) to 1. Raises ValueError on impossible values, by name.
    """

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("sampling", (InOrder(self.share),), self.window)

    def describe(self) -> InjectionCard:
        return self.card("in_order")
