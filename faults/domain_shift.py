"""A data mixture that moves to one source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.operation import Moment, Places, SamplingOperation
from foreshock.faults.share import ShareFault, chosen_rows

MOST_SOURCES = 1024


@dataclass(frozen=True)
class OneSource(SamplingOperation):
    """ceil(share x B) sequences of a batch begin in one of ``sources`` equal stretches of the corpus."""

    share: float
    source: int
    sources: int

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, starts_B: np.ndarray, places: Places, moment: Moment) -> np.ndarray:
        first, end = (places.count * index // self.sources for index in (self.source, self.source + 1))
        rows = chosen_rows("domain_shift", self.share, len(starts_B), moment)
        moved = starts_B.copy()
        moved[rows] = first + starts_B[rows] * (end - first) // places.count
        return moved


@dataclass(frozen=True)
class DomainShift(ShareFault):
    """A share of the sequences is of one source of the corpus, at the steps of a window.

    What breaks: a mixture whose other sources have run out, or whose weights are wrong. No public report is named.
    A corpus here has no labels of sources. Its files stand in the order of their paths, so that neighbours are alike:
    a source is one of ``sources`` equal stretches of the training part. Equation: for ceil(share x B) sequences of the
    batch, drawn from seed and step, a start a, uniform over N places, becomes f + floor(a L / N), uniform over the L
    places from f on that are the source's. All sources stay in the held-out batch. Sources of different sizes, and a
    mixture that moves bit by bit, are not modelled.

    share: 0 (the healthy control) to 1; sources: 2 to 1024;
    source: which of them, from 0. Raises ValueError on impossible values, by name.
    """

    source: int = 0
    sources: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.sources <= MOST_SOURCES:
            raise ValueError(f"fault.sources={self.sources} is not allowed: 2 to {MOST_SOURCES}")
        if not 0 <= self.source < self.sources:
            raise ValueError(f"fault.source={self.source} is not allowed: 0 to {self.sources - 1}")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("sampling", (OneSource(self.share, self.source, self.sources),), self.window)

    def describe(self) -> InjectionCard:
        return self.card("one_source", {"source": self.source, "sources": self.sources})
