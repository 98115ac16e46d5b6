"""One scale for the members of a joint detector, so that the heavy tail of one does not set the threshold of all.

A joint detector alarms where the largest of its members' statistics passes one threshold. Each member is first put on
a scale of its own, (statistic - centre) / spread, where centre and spread are mean and standard deviation of its path
maxima in the healthy reference runs, each judged by a band that the run itself had no part in. Calibration runs then
set the one threshold, as for any detector: the map is monotone, so the promise on false alarms is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foreshock.analysis.detect.rounding import mean_resolution

MIN_RUNS = 10
"""Under so many reference runs, members share one spread: their root mean square."""


@dataclass(frozen=True)
class Scale:
    """A member's map from its statistic to the common scale; the default leaves it as it is."""

    centre: float = 0.0
    spread: float = 1.0

    def of(self, statistic: Any) -> Any:
        return (statistic - self.centre) / self.spread

    def undone(self, threshold: float) -> float:
        """The statistic at which the member reaches a threshold of the common scale."""
        return self.centre + self.spread * threshold


def root_mean_square(spread_M: np.ndarray) -> float:
    return float(np.sqrt(np.mean(spread_M**2)))


def member_scales(
    maxima_MR: np.ndarray | Sequence[Sequence[float]], share: Callable[[np.ndarray], float] = root_mean_square
) -> tuple[Scale, ...]:
    """The scale of each of M members from its path maxima in R reference runs.

    A member whose maxima are all equal, but for rounding, takes the spread that members share, which ``share`` makes
    of those of all (M,); where that is 0 too, spread 1. Raises ValueError for fewer than 2 runs and for maxima that are
    not finite.
    """
    maxima_MR = np.asarray(maxima_MR, float)
    if maxima_MR.ndim != 2 or maxima_MR.shape[1] < 2 or not np.isfinite(maxima_MR).all():
        raise ValueError(f"maxima has shape {maxima_MR.shape}: (members, runs), at least 2 runs, finite, is needed")
    spread_M = np.where(np.ptp(maxima_MR, axis=1) <= mean_resolution(maxima_MR), 0.0, maxima_MR.std(axis=1, ddof=1))
    shared = share(spread_M) or 1.0
    few = maxima_MR.shape[1] < MIN_RUNS
    spreads = [shared if few or spread == 0 else float(spread) for spread in spread_M]
    return tuple(Scale(float(centre), spread) for centre, spread in zip(maxima_MR.mean(axis=1), spreads, strict=True))
