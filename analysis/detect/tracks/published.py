"""Raw readings at the number that the source of the signal gives."""

from __future__ import annotations

import numpy as np

from foreshock.analysis.detect.published import published_rule
from foreshock.analysis.detect.tracks.base import RANDOM_MATRIX, Raw
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import Signal


class PublishedTrack(Raw):
    """The statistic is 1 where the source's rule is broken, whatever false-alarm rate that has."""

    promises_rate, thresholds_are_scales = False, False

    def check_applies(self, signal: Signal) -> None:
        published_rule(signal)

    def kind_of(self, signal: Signal) -> str:
        """A number of random-matrix theory is no rule that a source proposes for monitoring."""
        return "theory" if signal.family == RANDOM_MATRIX else "detector"

    def statistic(self, signal: Signal, series: Aligned) -> np.ndarray:
        return published_rule(signal).broken_at(series).astype(float)

    def limit(self, looks: int, alpha: float) -> float:
        return 0.5
