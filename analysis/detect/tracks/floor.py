"""A signal that is already a ratio to what noise alone would give."""

from __future__ import annotations

from collections.abc import Sequence

from foreshock.analysis.detect.bands import Floor
from foreshock.analysis.detect.tracks.base import RANDOM_MATRIX, Charted, check_ratio
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import RATIO, Signal


class FloorTrack(Charted):
    """The value less what it is where there is nothing but noise: 1 for a ratio, 0 for a score (``Floor``)."""

    def check_applies(self, signal: Signal) -> None:
        if signal.family != RANDOM_MATRIX:
            check_ratio(signal, self.name)

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> Floor:
        return Floor(1.0 if signal.kind == RATIO else 0.0)
