"""A signal against healthy reference runs: the paper's own setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreshock.analysis.detect.alarms import oriented
from foreshock.analysis.detect.bands import ReferenceBand, left_out_z
from foreshock.analysis.detect.tracks.base import Charted
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import Signal


class ReferenceTrack(Charted):
    """The per-sample median and spread of healthy runs of the same configuration (``ReferenceBand``)."""

    primary, takes_files = True, True

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> ReferenceBand:
        return ReferenceBand.fit(signal.name, reference)

    def left_out(
        self, reference: Sequence[Aligned], series: Sequence[tuple[np.ndarray, ...]], bad: str
    ) -> list[tuple[np.ndarray, ...]]:
        return [tuple(oriented(z, bad)) for z in left_out_z(reference)]

    def lacks_baselines(self, declined: int, baselines: int) -> bool:
        return declined > 0
