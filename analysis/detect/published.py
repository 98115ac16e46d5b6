"""The thresholds that the sources of signals publish."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foreshock.analysis.detect.bands import DeclinedSignal, finite_or_inf
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import Signal


@dataclass(frozen=True)
class PublishedRule:
    """An alarm where a raw reading stands strictly above ``above`` or below ``below``, as its source says."""

    above: float
    below: float

    def broken_at(self, series: Aligned) -> np.ndarray:
        """(T,): whether any layer or head breaks the rule; a non-finite value does, a missing one does not."""
        x = finite_or_inf(series)
        return np.any((x > self.above) | (x < self.below), axis=(1, 2))


def published_rule(signal: Signal) -> PublishedRule:
    """The numeric rule of a signal's source. Raises DeclinedSignal where the source gives no number."""
    if signal.above is None and signal.below is None:
        raise DeclinedSignal(f"{signal.name}: no published threshold")
    above = np.inf if signal.above is None else signal.above
    below = -np.inf if signal.below is None else signal.below
    return PublishedRule(above, below)
