"""Detectors that hold a signal of a run against the run's own past, and their statistic in each run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np
import pandas as pd

from foreshock.analysis.detect.alarms import chart_statistics, first_alarm, fitted, oriented
from foreshock.analysis.detect.bands import SelfBand, finite_or_inf
from foreshock.analysis.detect.charts import EWMA, AlarmRule, Shewhart
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.runs.experiment import ScoredRun

MEDIAN_WINDOW = 50
"""Readings behind a trailing median."""


class OwnBand(Protocol):
    """z-scores of a series against itself, (T, layers, heads), causal."""

    def z(self, series: Aligned) -> np.ndarray: ...


@dataclass(frozen=True)
class TrailingMedian:
    """A reading over the median of the ``window`` readings before it, as log(x_t / median): 0 where nothing changes.

    NaN for the first ``window`` readings, for a missing one and where a median is not above 0; Inf kept; -Inf for a
    reading of 0 or less.
    """

    window: int = MEDIAN_WINDOW

    def z(self, series: Aligned) -> np.ndarray:
        """(T, layers, heads)."""
        x = finite_or_inf(series)
        flat = pd.DataFrame(np.where(np.isfinite(x), x, np.nan).reshape(len(x), -1))
        median = flat.shift(1).rolling(self.window, min_periods=self.window).median().to_numpy().reshape(x.shape)
        with np.errstate(all="ignore"):
            ratio = np.log(np.where(np.isnan(x), np.nan, np.maximum(x, 0.0)) / np.where(median > 0, median, np.nan))
        return np.where(np.isposinf(x), np.inf, ratio)


@dataclass(frozen=True)
class Watcher:
    """One signal, held against its own past, charted; larger is worse.

    name: in tables; signal; bad: its direction of harm; band, rule: as on the self track by default.
    """

    name: str
    signal: str
    bad: str = "up"
    band: OwnBand = field(default_factory=SelfBand)
    rule: AlarmRule = field(default_factory=lambda: EWMA(0.2))

    def statistic(self, run: ScoredRun) -> tuple[np.ndarray, np.ndarray]:
        """Steps and statistic, both (T,); NaN before there is a past."""
        series = run.signal(self.signal)
        z = self.band.z(Aligned(series.steps, series.values, series.undefined))
        sides = oriented(z, self.bad)
        return series.steps, chart_statistics([sides], fitted(self.rule, [sides]))[0]


@dataclass(frozen=True)
class Statistic:
    """One watcher in one run: steps and statistic, (T,)."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def maximum(self) -> float:
        """The largest statistic; -Inf where there is none."""
        return self.largest_before(None)

    def largest_before(self, step: int | None) -> float:
        """The largest statistic before a step, or of all."""
        known = ~np.isnan(self.values) & (self.steps < (np.inf if step is None else step))
        return float(np.max(self.values, initial=-np.inf, where=known))

    def alarm(self, threshold: float) -> int | None:
        return first_alarm(self.values, self.steps, threshold)


def paths(watcher: Watcher, runs: Iterable[ScoredRun]) -> dict[str, Statistic]:
    """By run id."""
    return {run.trace.run_id: Statistic(*watcher.statistic(run)) for run in runs}


@cache
def own_past(name: str, signal: str, bad: str) -> tuple[Watcher, Watcher]:
    """The two detectors of a signal: z-scores of the self track, and the ratio to its trailing median."""
    median = Watcher(f"{name} over its median", signal, bad, TrailingMedian(), Shewhart())
    return Watcher(f"{name}, self z", signal, bad), median
