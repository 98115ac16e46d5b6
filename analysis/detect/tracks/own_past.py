"""A signal against the run's own past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreshock.analysis.detect.bands import SELF_WINDOW, SelfBand
from foreshock.analysis.detect.tracks.base import Charted
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import Signal


class OwnPastTrack(Charted):
    """The run's own lagged window (``SelfBand``). Its z-scores have thresholds near 0: a ratio to one says nothing."""

    takes_files, thresholds_are_scales = True, False

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> SelfBand:
        return SelfBand()

    def lacks_baselines(self, declined: int, baselines: int) -> bool:
        return declined == baselines

    def counts(self, onset: int | None, positions: Sequence[np.ndarray]) -> bool:
        """Whether the fault begins after the first 2 W samples of every signal, so that the past is healthy."""
        past = 2 * SELF_WINDOW
        return onset is None or all(len(where) > past and onset > where[past - 1] for where in positions)
