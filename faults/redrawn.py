"""Sequences that are drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foreshock.faults.operation import Moment, Places, SamplingOperation


@dataclass(frozen=True)
class Redrawn(SamplingOperation):
    """The starts of all sequences of a batch are drawn again, uniformly, from seed, step and ``purpose``.

    purpose: no two of them share their draws; None for the run's own.
    """

    purpose: str | None

    @property
    def idle(self) -> bool:
        return self.purpose is None

    def apply(self, starts_B: np.ndarray, places: Places, moment: Moment) -> np.ndarray:
        if self.purpose is None:
            return starts_B
        return moment.generator(self.purpose).integers(places.count, size=len(starts_B))
