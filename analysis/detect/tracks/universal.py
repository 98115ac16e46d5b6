"""Ratios to predicted noise at the number that the prediction gives by itself."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from foreshock.analysis.detect.alarms import worst
from foreshock.analysis.detect.bands import DeclinedSignal, finite_or_inf
from foreshock.analysis.detect.tracks.base import Raw, check_ratio
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import Signal


class UniversalTrack(Raw):
    """The statistic is the largest ratio to predicted noise; calibration runs are healthy tests."""

    lists_declined, healthy_roles = False, ("test", "calibration")

    def check_applies(self, signal: Signal) -> None:
        check_ratio(signal, self.name)
        if not signal.universal:
            raise DeclinedSignal(f"{signal.name}: its predicted noise is a scale, and gives no threshold by itself")

    def statistic(self, signal: Signal, series: Aligned) -> np.ndarray:
        return worst(finite_or_inf(series))

    def limit(self, looks: int, alpha: float) -> float:
        return universal_threshold(looks, alpha)


def universal_threshold(looks: int, alpha: float) -> float:
    """The ratio to predicted noise that rounding alone passes in some of so many looks with probability <= alpha.

    z with looks x 2 (1 - Phi(z)) = alpha (Bonferroni, so looks may depend on each other). Where tokens differ, a
    residual is a sum of many rounding errors, hence Gaussian, and a ratio the root mean square of at least one of them
    over what is predicted. One alone, |N(0, 1)|, has the heaviest tail from z = 1.5 on, so z holds for any number of
    rows. Where tokens are alike, a healthy ratio lies between 0 and 2 (``monitors.rounding``), below any z here. No
    healthy run is asked: it promises as much as the prediction is right. Raises ValueError for looks < 1 or alpha
    outside (0, 1), and for an alpha / looks above 0.13, whose z is below 1.5.
    """
    if looks < 1:
        raise ValueError(f"looks={looks} is not allowed: at least 1")
    if not 0 < alpha < 1 or alpha / looks > 0.13:
        raise ValueError(f"alpha={alpha} is not allowed for {looks} looks: above 0, below 1 and 0.13 a look at most")
    return float(norm.isf(alpha / (2 * looks)))
