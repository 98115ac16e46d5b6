"""Tracks: what a signal is held against, in ways that are never mixed in one table.

``reference``: the per-sample median of healthy reference runs (the paper's own setting, not deployable).
``self``: the run's own lagged window (deployable; it cannot see a fault that is there from step 0).
``floor``: nothing; the signal is already a ratio to what noise alone would give.
``published``: the number that the source of the signal gives.
``universal``: the number that a prediction gives by itself: no ratio to predicted noise should ever pass it.
The first three give z-scores, (T samples, layers, heads), which charts and a conformal threshold follow; the last two
judge raw readings at a number that no run sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy.stats import norm

from foreshock.analysis.detect.alarms import oriented, worst
from foreshock.analysis.detect.bands import (
    SELF_WINDOW,
    DeclinedSignal,
    Floor,
    ReferenceBand,
    SelfBand,
    finite_or_inf,
    left_out_z,
)
from foreshock.analysis.detect.published import published_rule
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import RATIO, Signal

RANDOM_MATRIX = "random_matrix"
"""The family of scores that are 0 where there is nothing but noise."""

Band = ReferenceBand | SelfBand | Floor


class Track:
    """One way to judge a signal, and what its boards say of thresholds and runs.

    name: in tables and options; primary: the one whose boards have every table; takes_files: a detector file can be
    calibrated on it; promises_rate: a threshold keeps a false-alarm rate; thresholds_are_scales: a reading over its
    threshold says how large a fault is; lists_declined: a board shows why nobody is judged, where nobody is;
    healthy_roles: the healthy runs that set no threshold, so that their alarms are false ones.
    """

    name: ClassVar[str]
    primary: ClassVar[bool] = False
    takes_files: ClassVar[bool] = False
    promises_rate: ClassVar[bool] = True
    thresholds_are_scales: ClassVar[bool] = True
    lists_declined: ClassVar[bool] = True
    healthy_roles: ClassVar[tuple[str, ...]] = ("test",)

    def check_applies(self, signal: Signal) -> None:
        """Raise DeclinedSignal where the track has nothing to say of a signal, whatever its values."""

    def lacks_baselines(self, declined: int, baselines: int) -> bool:
        """Whether a contest is void where so many of its baselines cannot be judged."""
        return False

    def kind_of(self, signal: Signal) -> str:
        """The kind of the row of a detector that begins with a signal."""
        return "detector"

    def counts(self, onset: int | None, positions: Sequence[np.ndarray]) -> bool:
        """Whether a run with a fault from ``onset`` on is scored. positions: (T,) of the readings of each signal."""
        return True


class Charted(Track):
    """A track of z-scores, with a chart and a conformal threshold on calibration runs."""

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> Band:
        """The band of a signal that is not ``exact``. Raises DeclinedSignal where the track cannot judge it."""
        raise NotImplementedError

    def left_out(
        self, reference: Sequence[Aligned], series: Sequence[tuple[np.ndarray, ...]], bad: str
    ) -> list[tuple[np.ndarray, ...]]:
        """Of each reference run its one-sided worst series, judged without its own part in the band.

        series: the same, judged with it.
        """
        return list(series)


class ReferenceTrack(Charted):
    name, primary, takes_files = "reference", True, True

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> ReferenceBand:
        return ReferenceBand.fit(signal.name, reference)

    def left_out(
        self, reference: Sequence[Aligned], series: Sequence[tuple[np.ndarray, ...]], bad: str
    ) -> list[tuple[np.ndarray, ...]]:
        return [tuple(oriented(z, bad)) for z in left_out_z(reference)]

    def lacks_baselines(self, declined: int, baselines: int) -> bool:
        return declined > 0


class SelfTrack(Charted):
    """Its z-scores have thresholds near 0: a ratio to one says nothing."""

    name, takes_files, thresholds_are_scales = "self", True, False

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> SelfBand:
        return SelfBand()

    def lacks_baselines(self, declined: int, baselines: int) -> bool:
        return declined == baselines

    def counts(self, onset: int | None, positions: Sequence[np.ndarray]) -> bool:
        """Whether the fault begins after the first 2 W samples of every signal, so that the past is healthy."""
        past = 2 * SELF_WINDOW
        return onset is None or all(len(where) > past and onset > where[past - 1] for where in positions)


class FloorTrack(Charted):
    name = "floor"

    def check_applies(self, signal: Signal) -> None:
        if signal.family != RANDOM_MATRIX:
            check_ratio(signal, self.name)

    def band(self, signal: Signal, reference: Sequence[Aligned]) -> Floor:
        return Floor(1.0 if signal.kind == RATIO else 0.0)


class Raw(Track):
    """A track of raw readings, each signal by itself, at a number that no run sets."""

    def statistic(self, signal: Signal, series: Aligned) -> np.ndarray:
        """(T,): what passes ``limit`` where the signal alarms; NaN where it is missing."""
        raise NotImplementedError

    def limit(self, looks: int, alpha: float) -> float:
        """What a statistic must stand strictly above. looks: readings of one run, over all signals of a detector."""
        raise NotImplementedError


class PublishedTrack(Raw):
    """The statistic is 1 where the source's rule is broken, whatever false-alarm rate that has."""

    name, promises_rate, thresholds_are_scales = "published", False, False

    def check_applies(self, signal: Signal) -> None:
        published_rule(signal)

    def kind_of(self, signal: Signal) -> str:
        """A number of random-matrix theory is no rule that a source proposes for monitoring."""
        return "theory" if signal.family == RANDOM_MATRIX else "detector"

    def statistic(self, signal: Signal, series: Aligned) -> np.ndarray:
        return published_rule(signal).broken_at(series).astype(float)

    def limit(self, looks: int, alpha: float) -> float:
        return 0.5


class UniversalTrack(Raw):
    """The statistic is the largest ratio to predicted noise; calibration runs are healthy tests."""

    name, lists_declined, healthy_roles = "universal", False, ("test", "calibration")

    def check_applies(self, signal: Signal) -> None:
        check_ratio(signal, self.name)
        if not signal.universal:
            raise DeclinedSignal(f"{signal.name}: its predicted noise is a scale, and gives no threshold by itself")

    def statistic(self, signal: Signal, series: Aligned) -> np.ndarray:
        return worst(finite_or_inf(series))

    def limit(self, looks: int, alpha: float) -> float:
        return universal_threshold(looks, alpha)


TRACKS: dict[str, Track] = {
    track.name: track for track in (ReferenceTrack(), SelfTrack(), FloorTrack(), PublishedTrack(), UniversalTrack())
}


def check_ratio(signal: Signal, track: str) -> None:
    """Raise DeclinedSignal for a signal that is no ratio to its predicted noise."""
    if signal.kind != RATIO:
        raise DeclinedSignal(f"{signal.name}: no ratio to predicted noise, so the {track} track has no say")


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
