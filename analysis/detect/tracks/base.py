"""What every track has, of z-scores (``Charted``) or of raw readings (``Raw``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from foreshock.analysis.detect.bands import DeclinedSignal
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import RATIO, Signal

RANDOM_MATRIX = "random_matrix"
"""The family of scores that are 0 where there is nothing but noise."""


class Band(Protocol):
    """How far a series stands from what a signal does in health (``analysis.detect.bands``)."""

    def z(self, series: Aligned) -> np.ndarray:
        """(T, layers, heads) z-scores; NaN where a sample is missing, Inf kept."""
        ...


@dataclass(frozen=True)
class Track:
    """One way to judge a signal, and what its boards say of thresholds and runs.

    name: in tables and options, that of its file in ``conf/track``; primary: the one whose boards have every table;
    takes_files: a detector file can be calibrated on it; promises_rate: a threshold keeps a false-alarm rate;
    thresholds_are_scales: a reading over its threshold says how large a fault is; lists_declined: a board shows why
    nobody is judged, where nobody is; healthy_roles: the healthy runs that set no threshold, so that their alarms are
    false ones. A track is a ``Charted`` or a ``Raw`` one.
    """

    name: str

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


class Charted(Track, ABC):
    """A track of z-scores, with a chart and a conformal threshold on calibration runs."""

    @abstractmethod
    def band(self, signal: Signal, reference: Sequence[Aligned]) -> Band:
        """The band of a signal that is not ``exact``. Raises DeclinedSignal where the track cannot judge it."""

    def left_out(
        self, reference: Sequence[Aligned], series: Sequence[tuple[np.ndarray, ...]], bad: str
    ) -> list[tuple[np.ndarray, ...]]:
        """Of each reference run its one-sided worst series, judged without its own part in the band.

        series: the same, judged with it.
        """
        return list(series)


class Raw(Track, ABC):
    """A track of raw readings, each signal by itself, at a number that no run sets."""

    @abstractmethod
    def statistic(self, signal: Signal, series: Aligned) -> np.ndarray:
        """(T,): what passes ``limit`` where the signal alarms; NaN where it is missing."""

    @abstractmethod
    def limit(self, looks: int, alpha: float) -> float:
        """What a statistic must stand strictly above. looks: readings of one run, over all signals of a detector."""


def check_ratio(signal: Signal, track: str) -> None:
    """Raise DeclinedSignal for a signal that is no ratio to its predicted noise."""
    if signal.kind != RATIO:
        raise DeclinedSignal(f"{signal.name}: no ratio to predicted noise, so the {track} track has no say")
